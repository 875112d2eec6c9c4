"""Exact evaluation of arithmetic that a model wrote: integers, + - * /, parentheses, unary minus.

The text is untrusted: nothing is executed, nothing recurses, and time is linear in its length. Anything else than that
grammar is `None`, not an exception, because a wrong answer is an ordinary event. Decided on purpose:

* `×`, `÷` and `−` (U+2212) are read as `*`, `/` and `-`: language models write them for the same thing.
* A minus before an operand is allowed (`-3+8`) and is no number of its own; a plus before an operand is not.
* Numbers are plain ASCII digits. `3.0`, `1_0`, `0x1f`, `1e3`, other scripts' digits and `03` are not numbers here.
* An equation is not an expression: `3*8=24` is refused, as the paper's grader refuses it.
* No juxtaposition (`3(4+5)`), no `//`, no `**`.
"""

from fractions import Fraction

MAX_LENGTH_CHARACTERS = 1000
MAX_NESTING = 100

_DIGITS = "0123456789"
_SAME_AS = {"×": "*", "÷": "/", "−": "-"}
_PRECEDENCE = {"(": 0, "+": 1, "-": 1, "*": 2, "/": 2, "negate": 3}


def tokenize(text: str) -> list[int | str] | None:
    """Split an expression into integers and one-character operators; None where it holds anything else."""
    if len(text) > MAX_LENGTH_CHARACTERS:
        return None
    tokens: list[int | str] = []
    position = 0
    while position < len(text):
        character = _SAME_AS.get(text[position], text[position])
        if character in _DIGITS:
            end = position + 1
            while end < len(text) and text[end] in _DIGITS:
                end += 1
            if character == "0" and end > position + 1:
                return None
            tokens.append(int(text[position:end]))
            position = end
            continue
        if character in "+-*/()":
            tokens.append(character)
        elif character not in " \t\r\n":
            return None
        position += 1
    return tokens


def evaluate(tokens: list[int | str]) -> Fraction | None:
    """Return the exact value of a tokenized expression; None where it is malformed, too deep or divides by zero.

    Two stacks and operator precedence, so that depth costs memory and never the interpreter's stack.
    """
    values: list[Fraction] = []
    operators: list[str] = []
    depth = 0
    operand_expected = True
    for token in tokens:
        if isinstance(token, int):
            if not operand_expected:
                return None
            values.append(Fraction(token))
            operand_expected = False
        elif token == "(":
            depth += 1
            if not operand_expected or depth > MAX_NESTING:
                return None
            operators.append(token)
        elif token == ")":
            depth -= 1
            if operand_expected or depth < 0:
                return None
            while operators[-1] != "(":
                if not _apply(operators.pop(), values):
                    return None
            operators.pop()
        elif operand_expected:
            if token != "-":
                return None
            operators.append("negate")
        else:
            while operators and _PRECEDENCE[operators[-1]] >= _PRECEDENCE[token]:
                if not _apply(operators.pop(), values):
                    return None
            operators.append(token)
            operand_expected = True
    if operand_expected or depth != 0:
        return None
    while operators:
        if not _apply(operators.pop(), values):
            return None
    return values[0]


def _apply(operator: str, values: list[Fraction]) -> bool:
    """Apply one operator to the top of the value stack; False for a division by zero."""
    right = values.pop()
    if operator == "negate":
        values.append(-right)
        return True
    left = values.pop()
    if operator == "+":
        values.append(left + right)
    elif operator == "-":
        values.append(left - right)
    elif operator == "*":
        values.append(left * right)
    else:
        if right == 0:
            return False
        values.append(left / right)
    return True
