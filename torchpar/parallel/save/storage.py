# SPDX-License-Identifier: MIT
"""Extensions of torch.distributed.checkpoint: shards of tensors, a writer with clear errors, a safe reader.

Unpickling uses allow-lists only: `torch.load` with ``weights_only`` for tensors, and `_Unpickler` for the
checkpoint's metadata.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from torchpar.parts import Part

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


class LocalShard(torch.Tensor):
    """A rank's slice of a tensor that is split over ranks, for torch.distributed.checkpoint.

    If the number of ranks does not divide an axis, a `torch.distributed.tensor.DTensor` would cut it at other
    places than our layers do.
    """

    part: Part

    @staticmethod
    def of(t: Tensor, part: Part) -> "LocalShard":
        """Return ``t``, which is ``part`` of a tensor."""
        shard = t.detach().as_subclass(LocalShard)
        shard.part = part
        return shard

    def size(self) -> torch.Size:  # type: ignore[override]
        """The shape of the whole tensor, with which a planner compares the saved one."""
        return torch.Size(self.part.whole)

    def plain(self) -> Tensor:
        return self.as_subclass(torch.Tensor)

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(self.part.start), torch.Size(self.part.size))]

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        (chunk,) = self.__create_chunk_list__()
        properties = TensorProperties.create_from_tensor(self.plain())
        data = TensorWriteData(chunk=chunk, properties=properties, size=self.size())
        return [WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)]

    def __get_tensor_shard__(self, _: MetadataIndex) -> Tensor:
        return self.plain()


def copy_to_cpu(t: Tensor) -> Tensor:
    """Return a copy of ``t`` on the CPU, a `LocalShard` of a `LocalShard`."""
    if isinstance(t, LocalShard):
        return LocalShard.of(copy_to_cpu(t.plain()), t.part)
    return t.detach().to("cpu", copy=True)


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
