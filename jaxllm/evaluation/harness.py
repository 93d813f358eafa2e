"""EleutherAI's lm-evaluation-harness with models of this project: its command, with one more model.

    python -m jaxllm.evaluation.harness --model jaxllm --model_args path=runs/first \\
        --tasks hellaswag --batch_size 32

The harness finds models in a list of its own, so the command is run from here; all arguments are
its own (https://github.com/EleutherAI/lm-evaluation-harness). From Python, call `register` first.
"""

import importlib
import os
import sys
from collections.abc import Sequence

from jaxllm.errors import UserError

MODEL = "jaxllm"
"""What `--model` calls it."""


def register() -> None:
    """Lets the harness of this process know the model, and keeps it from forking.

    Raises:
        UserError: the harness is not installed.
    """
    try:
        importlib.import_module("lm_eval.models")  # its own models, which are registered once
        registry = importlib.import_module("lm_eval.api.registry").model_registry
    except ImportError as error:
        raise UserError(
            f"lm-evaluation-harness cannot be imported ({error}): pip install 'jaxllm[eval]'."
        ) from None
    # Its bootstrap forks, and the threads of JAX may hold locks that no fork lets go of.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    if MODEL not in registry:
        registry.register(MODEL, target="jaxllm.evaluation.harness_model:HarnessModel")


def main(arguments: Sequence[str]) -> int:
    """Runs the command of the harness and returns the exit code."""
    try:
        register()
        command = importlib.import_module("lm_eval.__main__").cli_evaluate
        sys.argv = ["lm_eval", *arguments]  # it reads them there
        command()
    except UserError as error:
        print(f"jaxllm: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
