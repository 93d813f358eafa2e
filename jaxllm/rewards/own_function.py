"""A reward function of the user's own, found by `MODULE:FUNCTION`."""

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from jaxllm.errors import UserError


def load_function(module_name: str, name: str) -> Callable[..., Any]:
    """Imports a module of Python's path or the current directory, and takes a function of it.

    Raises:
        UserError: there is no such module or function, or the module raises; the message is one
            line, and says what to do.
    """
    # For good: a function may import its neighbours when it is called. Last, so that nothing
    # installed is hidden by a file that happens to lie here.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise UserError(_import_failed(module_name, error)) from error
    function = getattr(module, name, None)
    if not callable(function):
        functions = [own for own in vars(module) if callable(getattr(module, own))]
        near = difflib.get_close_matches(name, functions, n=1)
        hint = f"did you mean {module_name}:{near[0]}?" if near else "define it there."
        raise UserError(f"the module {module_name} has no function {name}; {hint}")
    return function


def _import_failed(module_name: str, error: BaseException) -> str:
    missing = (error.name or "") if isinstance(error, ModuleNotFoundError) else ""
    if missing and f"{module_name}.".startswith(f"{missing}."):  # itself, or a package of it
        return (
            f"there is no module {missing}, neither on Python's path nor in the current directory "
            f"({os.getcwd()}); start in the folder that holds it, or name that in PYTHONPATH."
        )
    text = " ".join(str(error).split())
    return (
        f"the module {module_name} cannot be imported ({type(error).__name__}: {text}"
        f"{_place(error)}); mend it."
    )


def _place(error: BaseException) -> str:
    """`, FILE:LINE` of where a module raised, as near as can be told."""
    if isinstance(error, SyntaxError):  # whose own text ends with them
        return ""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "importlib" not in f.filename and f.filename != __file__]
    return f", {own[-1].filename}:{own[-1].lineno}" if own else ""
