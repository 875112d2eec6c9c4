"""Generation backends: `ENGINES` names them, `base` says what one must do."""

# What ``--engine`` can be, and the class that answers; ``package.module:Class`` names a class of your own.
ENGINES = {
    "hf": "estune.engines.hf.engine:HFEngine",
    "toy": "estune.engines.toy:ToyEngine",
}
