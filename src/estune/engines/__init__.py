"""Generation backends: `ENGINES` names them, and `base` defines their protocol."""

# Choices of ``--engine`` and their classes; ``package.module:Class`` names a class of your own.
ENGINES = {
    "hf": "estune.engines.hf.engine:HFEngine",
    "vllm": "estune.engines.vllm.engine:VLLMEngine",
    "toy": "estune.engines.toy:ToyEngine",
}
