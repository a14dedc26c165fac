# SPDX-License-Identifier: MIT
"""Extensions of torch.distributed.checkpoint: a writer with clear errors, and a safe reader.

Unpickling uses allow-lists only: `torch.load` with ``weights_only`` for tensors, and `_Unpickler` for the
checkpoint's metadata.
"""

import pickle
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

# The classes in torch.distributed.checkpoint's metadata of tensors. BytesStorageMetadata, for other objects,
# is left out, because PyTorch would unpickle those objects without an allow-list.
_CLASSES = {
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},  # the same in Python 3.13
    "torch": {"Size", "float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a checkpoint's metadata")
        return super().find_class(module, name)


class Writer(FileSystemWriter):
    """PyTorch's writer, with the error of a file that could not be written."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as e:
            # After a failed write PyTorch cannot close its archive, and that error hides the first one.
            if isinstance(e.__context__, OSError):
                raise e.__context__ from e
            raise


class Reader(FileSystemReader):
    """PyTorch's reader, which unpickles the metadata by an allow-list."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        assert metadata.storage_meta is not None
        metadata.storage_meta.load_id = self.load_id
        return metadata
