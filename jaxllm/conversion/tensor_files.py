"""Files of tensors: names and shapes first, then slices. Nothing in them is ever executed."""

import contextlib
import importlib.util
import json
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open

from jaxllm.errors import UserError

SAFETENSORS = "model.safetensors"
TORCH = "pytorch_model.bin"
# Weights that are quantised are integers, or come in narrower floats with scales beside them.
_PLAIN = ("F64", "F32", "F16", "BF16")


class _SafetensorsFile:
    """A file of tensors by name, read slice by slice."""

    def __init__(self, path: Path, stack: contextlib.ExitStack) -> None:
        try:
            self._file = stack.enter_context(safe_open(path, framework="numpy"))
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from None
        self._slices = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118
        self.shapes = {name: tuple(s.get_shape()) for name, s in self._slices.items()}

    def dtype(self, name: str) -> str:
        """The dtype of a tensor, as the format names it."""
        return self._slices[name].get_dtype()

    def read(self, name: str, where: tuple[slice, ...]) -> Shaped[np.ndarray, "..."]:
        """A part of a tensor."""
        return self._slices[name][where]


class _TorchFile:
    """The same of PyTorch's, a pickle, which its own reader of tensors alone takes apart."""

    def __init__(self, path: Path, stack: contextlib.ExitStack) -> None:
        if not importlib.util.find_spec("torch"):
            raise UserError(
                f"{path}: only PyTorch reads this format; install it (pip install torch), or take "
                "the same weights as safetensors."
            )
        import torch

        try:
            loaded = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
        except pickle.UnpicklingError:
            raise UserError(
                f"{path}: holds more than tensors, or is damaged, and is not read; take the same "
                "weights as safetensors."
            ) from None
        # Damaged archives raise errors of many kinds.
        except Exception:
            raise UserError(f"{path}: is cut short or damaged; download it again.") from None
        self._torch = torch
        self._tensors: dict[str, Any] = _named_tensors(path, loaded)
        stack.callback(self._tensors.clear)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def dtype(self, name: str) -> str:
        torch = self._torch
        names = zip(
            (torch.float64, torch.float32, torch.float16, torch.bfloat16), _PLAIN, strict=True
        )
        return dict(names).get(self._tensors[name].dtype, str(self._tensors[name].dtype))

    def read(self, name: str, where: tuple[slice, ...]) -> Shaped[np.ndarray, "..."]:
        part = self._tensors[name][where].contiguous()
        if part.dtype == self._torch.bfloat16:  # NumPy has none of its own
            return part.view(self._torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return part.numpy()


class TensorFiles:
    """All tensors of a folder, in however many files."""

    def __init__(self, folder: Path, files: Mapping[str, _SafetensorsFile | _TorchFile]) -> None:
        """Joins files by their names in `folder`."""
        self.folder = folder
        self._file_of = {name: file for file, opened in files.items() for name in opened.shapes}
        self._files = files
        self.shapes = {
            name: tuple(shape) for file in files.values() for name, shape in file.shapes.items()
        }

    def dtype(self, name: str) -> str:
        """The dtype of a tensor, as the safetensors format names it."""
        return self._files[self._file_of[name]].dtype(name)

    def read(self, name: str, where: tuple[slice, ...]) -> Shaped[np.ndarray, "..."]:
        """A part of a tensor, in the dtype of the file.

        Raises:
            UserError: the tensor is of no plain dtype, or cannot be read.
        """
        path = self.folder / self._file_of[name]
        file = self._files[self._file_of[name]]
        if self.dtype(name) not in _PLAIN:
            raise UserError(
                f"{path}: the tensor {name} is of dtype {self.dtype(name)}; quantised weights are "
                "not read, so take those that are not quantised."
            )
        try:
            return file.read(name, where)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise _damaged(path, error) from None


@contextlib.contextmanager
def open_tensors(
    folder: Path, safetensors: str = SAFETENSORS, torch: str = TORCH
) -> Iterator[TensorFiles]:
    """The tensors of a folder: of `model.safetensors`, of the files of its index, or of PyTorch's
    `pytorch_model.bin` or the files of its index; or of files of other names.

    Raises:
        UserError: there are none of these, a file is missing or damaged, or those of PyTorch are
            there alone and PyTorch is not.
    """
    for name, opener in ((safetensors, _SafetensorsFile), (torch, _TorchFile)):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            files = [name]
        elif index.is_file():
            files = _indexed(index)
        else:
            continue
        with contextlib.ExitStack() as stack:
            yield TensorFiles(folder, {file: opener(folder / file, stack) for file in files})
        return
    raise UserError(
        f"{folder}: holds no weights ({safetensors}, {safetensors}.index.json, {torch} and "
        f"{torch}.index.json are missing)."
    )


def _named_tensors(path: Path, loaded: Any) -> dict[str, Any]:
    """What a file of PyTorch's gave, if it is tensors by name and nothing else."""
    import torch

    if not isinstance(loaded, dict):
        raise UserError(
            f"{path}: holds no tensors by name, but a {type(loaded).__name__}; save the model's "
            "state_dict()."
        )
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise UserError(
                f"{path}: holds {name!r}, a {type(tensor).__name__}, and not tensors by name "
                "alone; save the model's state_dict()."
            )
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise UserError(
                f"{path}: the tensor {name} has no plain values ({tensor.layout}, on "
                f"{tensor.device}); save it dense, on the CPU."
            )
    return {name: tensor.detach() for name, tensor in loaded.items()}


def _indexed(index: Path) -> list[str]:
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index}: cannot be read ({error!r}).") from None
    for file in named:
        if not isinstance(file, str):
            raise UserError(f"{index}: cannot be read (weight_map: {file!r} is no file's name).")
    files = sorted(set(named))
    for file in files:
        if Path(file).name != file or not (index.parent / file).is_file():
            raise UserError(
                f"{index.parent / file}: is missing, and {index.name} lists it; download it too."
            )
    return files


def _damaged(path: Path, error: Exception) -> UserError:
    reason = (str(error).strip() or repr(error)).splitlines()[0][:200]
    return UserError(f"{path}: is cut short or damaged ({reason}); download it again.")
