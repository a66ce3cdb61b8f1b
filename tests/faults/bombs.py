"""Small files that ask for gigabytes or for years, by name; and what reads one, with its peak of memory.

python -m tests.faults.bombs FOLDER NAME ...     writes and reads each, prints a line of JSON for it
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import io
import json
import os
import pickle
import resource
import struct
import sys
import tarfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from facefast.data import make_loader, read_bin, read_index, read_pairs
from facefast.data.corrections import read_corrections
from facefast.data.index import FaceIndex
from facefast.models import build_model, checkpoint, load_source
from facefast.recipe import ImageSpec, ModelConfig
from facefast.runtime import files, manifest
from facefast.runtime.exits import StorageError
from tests.faults.fuzz import peak_bytes, reset_peak
from tests.support import foreign_files
from tests.support.faulty import jpeg

GIGA = 1 << 30
# 8255 bytes on which HDF5 1.14 ends its process, found by damaging a file of Keras'.
CRASH = (
    b"c-rllJx{_w7{~8g8X5wzBqqH0)`5XdM&m{VWiVpYfw(9pjU`qFFcBvP7u+2j-E<^z(2wBk?BEyhD~N6HuI-(%1Yg3?=g08$p1a;1"
    b"_xy8B{#UiidMc4mAO}@NF{Gg&BT7l<+pPbPMoi;?#(Rn7Ww$R&^BS9<CVDi#w^OY;qelX4oi~L<6#-GCRxNKkvEk{6@GSA;EJ2U8"
    b"U#|O|ev5Hl@8k5V&4GSFzhCt`Q2tlHyIb`Nwr69y(`8|P+BOxaQ5b1jG4Z^T$fW0)LbLWQac;DZ&9j4c^VH}%`COmWTJz4FR03nt"
    b"V%HaoiNGZxu}9Uf8FqjEeZ=<FqlugRWdCbpt-gr^f@Hd2da;&|TFvfiiQAu>KQTIO!&)towk+t@64tq$0Sy5F0000000000z_eig"
    b"f#};OsZ)jRC&$;YniodLw>3}>hx-~>@B?tbRB*h4aek?}!21wDv=IGLoyI4@-{M^;gos<^>uzPjbw$5)80U5TQ=ctrV5E>U!>nB-"
    b"QNrFG5FWGct7&}+#i#-@D$4X}zhYO&>6avlUM-|BGG<aK2s`Rc^*o5KB+s`UE{2b1`fJRCmcn(FeSEq8Xk6|;bj{*>`R<kb4E>#~"
    b"3Of5R@(dzfj!*VMg|h"
)


def zeros(target: Path, members: dict[str, bytes], last: str, before: bytes = b"") -> None:
    """A zip archive in which 3 GB of zeros follow `before` in the member `last`, compressed to 3 MB."""
    # Deflate may be cut between blocks that know nothing of each other: one is made, and repeated.
    press = zlib.compressobj(9, zlib.DEFLATED, -15)
    head = press.compress(before) + press.flush(zlib.Z_FULL_FLUSH)
    block = press.compress(bytes(1 << 24)) + press.flush(zlib.Z_FULL_FLUSH)
    body = head + block * 192 + press.flush()
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        archive.writestr(last, body)
        found = archive.getinfo(last)
        found.compress_type, found.file_size = zipfile.ZIP_DEFLATED, len(before) + (192 << 24)


def npz(folder: Path) -> object:
    """3 MB of zeros that become 3 GB."""
    out = io.BytesIO()
    shape: dict[str, Any] = {"descr": "|u1", "fortran_order": False, "shape": (192 << 24,)}
    np.lib.format.write_array_header_1_0(out, shape)
    zeros(folder / "a.npz", {}, "w.npy", out.getvalue())
    return load_source(folder / "a.npz")


def npz_of_lies(folder: Path) -> object:
    """A shape of 3 TB before ten bytes."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        out,
        {"descr": "<f4", "fortran_order": False, "shape": (768 * GIGA,)},
    )
    with zipfile.ZipFile(folder / "a.npz", "w") as archive:
        archive.writestr("w.npy", out.getvalue() + b"0123456789")
    return load_source(folder / "a.npz")


def h5(folder: Path) -> object:
    """A data set of 4 GB without one number: what is not there reads as 0."""
    h5py: Any = importlib.import_module("h5py")
    with h5py.File(folder / "a.h5", "w") as file:
        file.attrs["layer_names"] = [b"dense"]
        group = file.create_group("dense")
        group.attrs["weight_names"] = [b"kernel:0"]
        group.create_dataset("kernel:0", (GIGA,), "f4", chunks=(1 << 20,))
    return load_source(folder / "a.h5")


def h5_crash(folder: Path) -> object:
    (folder / "a.h5").write_bytes(zlib.decompress(base64.b85decode(CRASH)))
    return load_source(folder / "a.h5")


def torch_zip(folder: Path) -> object:
    """A torch file whose numbers are compressed: 3 MB for 3 GB."""
    out = io.BytesIO()
    torch.save({"w": torch.zeros(4)}, out)
    with zipfile.ZipFile(out) as old:
        members = {name: old.read(name) for name in old.namelist()}
    last = next(name for name in members if name.endswith("/data/0"))
    del members[last]
    zeros(folder / "a.pt", members, last)
    return load_source(folder / "a.pt")


def torch_views(folder: Path) -> object:
    """One number as a matrix of a billion."""
    torch.save({f"w{k}": torch.zeros(1).expand(1 << 15, 1 << 15) for k in range(9)}, folder / "a.pt")
    return load_source(folder / "a.pt")


def torch_hash(folder: Path) -> object:
    """A dictionary's key that is a pair of one pair of one pair ...: its hash takes 2^60 steps."""
    key = b")" + b"".join(b"q" + bytes([k]) + b"0h" + bytes([k]) + b"h" + bytes([k]) + b"\x86" for k in range(60))
    out = io.BytesIO()
    torch.save({"w": torch.zeros(4)}, out)
    with zipfile.ZipFile(out) as old, zipfile.ZipFile(folder / "a.pt", "w") as new:
        for name in old.namelist():
            data = b"\x80\x02}" + key + b"K\x01s." if name.endswith("data.pkl") else old.read(name)
            new.writestr(name, data)
    return load_source(folder / "a.pt")


def caffemodel(folder: Path) -> object:
    """A blob of 300 000 axes."""
    axes = b"\xff\xff\xff\xff\x7f" * 300_000

    def field(number: int, value: bytes) -> bytes:
        return foreign_files._bytes(number, value)

    blob = field(7, field(1, axes)) + field(5, b"\0" * 4)
    (folder / "a.caffemodel").write_bytes(field(100, field(1, b"conv") + field(7, blob)))
    return load_source(folder / "a.caffemodel")


def t7(folder: Path) -> object:
    """60 tables, each of which holds the next one twice."""
    data = b""
    for k in range(1, 61):
        data += struct.pack("<4id", 3, k, 2, 1, 1.0)
    data += struct.pack("<i", 0)
    for k in range(60, 0, -1):  # the second entry of each: a number, and the table that is known by now
        data += struct.pack("<id2i", 1, 2.0, 3, k + 1) if k < 60 else struct.pack("<idi", 1, 2.0, 0)
    (folder / "a.t7").write_bytes(data)
    return load_source(folder / "a.t7")


def t7_views(folder: Path) -> object:
    """One number as 2^50."""
    text = b"".join(struct.pack("<i", len(t)) + t for t in (b"V 1", b"torch.FloatTensor"))
    storage = b"".join(struct.pack("<i", len(t)) + t for t in (b"V 1", b"torch.FloatStorage"))
    tensor = struct.pack("<2i", 4, 2) + text + struct.pack("<i5q", 2, 1 << 25, 1 << 25, 0, 0, 1)
    tensor += struct.pack("<2i", 4, 3) + storage + struct.pack("<qf", 1, 1.0)
    (folder / "a.t7").write_bytes(struct.pack("<5i", 3, 1, 1, 2, 6) + b"weight" + tensor)
    return load_source(folder / "a.t7")


def safetensors(folder: Path) -> object:
    """A header of a gigabyte, all of it a hole."""
    with open(folder / "a.safetensors", "wb") as file:
        file.write(struct.pack("<Q", GIGA))
        file.truncate(GIGA + 8)
    return load_source(folder / "a.safetensors")


def safetensors_hole(folder: Path) -> object:
    """A tensor of 8 GB that was never written."""
    header = b'{"w":{"dtype":"F32","shape":[2147483648],"data_offsets":[0,8589934592]}}'
    with open(folder / "a.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 8 * GIGA)
    return float(next(iter(load_source(folder / "a.safetensors").state.values())).sum())


def model(folder: Path) -> object:
    """A package that describes an embedding of 20 million numbers."""
    small = build_model(ModelConfig(backbone="mobilefacenet_half", embedding=8), 2, ImageSpec(32))
    checkpoint.write_tensors(folder / "model.safetensors", small.state_dict())
    files.write_json(folder / "model.json", small.to_config() | {"embedding": 20_000_000})
    manifest.write(folder, 0)
    return checkpoint.load_model(folder)


def model_as_source(folder: Path) -> object:
    with contextlib.suppress(ValueError):
        model(folder)
    return build_model(ModelConfig(), 0, source=load_source(folder))


def model_of_empty_tensors(folder: Path) -> object:
    """A published layout whose last layer has 20 million rows of nothing."""
    small = build_model(ModelConfig(backbone="mobilefacenet"), 0, ImageSpec(112)).backbone.state_dict()
    small["linear1.conv.weight"] = torch.empty(20_000_000, 0, 1, 1)
    checkpoint.write_tensors(folder / "a.safetensors", small)
    return build_model(ModelConfig(), 0, source=load_source(folder / "a.safetensors"))


def json_parts(folder: Path) -> object:
    """20 million empty lists."""
    (folder / "model.json").write_bytes(b"[" + b"[]," * (20 << 20) + b"[]]")
    (folder / "model.safetensors").write_bytes(b"")
    manifest.write(folder, 0)
    return checkpoint.load_model(folder)


def bin_lists(folder: Path) -> object:
    """A hundred bytes that announce 2^31 entries: bytes(2147483647) as a picture."""
    (folder / "a.bin").write_bytes(pickle.dumps(([2**31 - 1] * 2, [True]), 2))
    return read_bin(folder / "a.bin")


def bin_memo(folder: Path) -> object:
    """Python's own unpickler makes room for as many values as the highest number that is used."""
    (folder / "a.bin").write_bytes(b"\x80\x02]r\xff\xff\xff\x7f.")
    return read_bin(folder / "a.bin")


def bin_bytes(folder: Path) -> object:
    (folder / "a.bin").write_bytes(b"\x80\x04]\x8e" + struct.pack("<Q", 8 * GIGA) + b"x" * 50)
    return read_bin(folder / "a.bin")


def bin_tuples(folder: Path) -> object:
    """The name of a module that is a pair of one pair of one pair ..."""
    pairs = b")" + b"".join(b"q" + bytes([k]) + b"0h" + bytes([k]) + b"h" + bytes([k]) + b"\x86" for k in range(60))
    (folder / "a.bin").write_bytes(b"\x80\x04" + pairs + b"\x8c\x01x\x93.")
    return read_bin(folder / "a.bin")


def saved_index(folder: Path) -> object:
    """Columns of 3 GB in 3 MB."""
    (folder / "0.jpg").write_bytes(jpeg())
    FaceIndex.build(folder, [b"0.jpg"], None, ()).save(folder / "small.npz")
    with zipfile.ZipFile(folder / "small.npz") as old:
        members = {name: old.read(name) for name in old.namelist()}
    paths = members.pop("paths.npy")
    zeros(folder / "a.npz", members, "paths.npy", paths)
    return read_index(folder / "a.npz")


def tar_of_brackets(folder: Path) -> object:
    data = b"[" * 500_000
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name, content in (("a.jpg", jpeg()), ("a.json", data)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return read_index(folder / "a.tar")


def table_of_one_line(folder: Path) -> object:
    with open(folder / "a.csv", "wb") as file:
        file.write(b"kind,path,identity,suggested,action\n")
        file.truncate(GIGA)
    return read_corrections(folder / "a.csv")


def table_of_cells(folder: Path) -> object:
    (folder / "a.csv").write_bytes(b"kind,path,identity,suggested,action\n" + b"a," * (100 << 20))
    return read_corrections(folder / "a.csv")


def pairs_of_short_lines(folder: Path) -> object:
    (folder / "ann").mkdir()
    (folder / "ann" / "ann_0001.jpg").write_bytes(jpeg())
    (folder / "pairs.txt").write_bytes(b"a\n" * (100 << 20))
    return read_pairs(read_index(folder, "folder"), folder / "pairs.txt")


def idx_of_one_line(folder: Path) -> object:
    (folder / "a.rec").write_bytes(struct.pack("<2I", 0xCED7230A, 24) + bytes(24))
    with open(folder / "a.idx", "wb") as file:
        file.write(b"0\t")
        file.truncate(GIGA)
    return read_index(folder / "a.rec")


def _one_epoch(folder: Path, batch_size: int = 8) -> int:
    index = read_index(folder, "folder").scanned()
    if index.faults.all():
        raise ValueError(f"all have faults: {set(index.faults.tolist())}")
    with make_loader(index, ImageSpec(112), batch_size=batch_size) as loader:
        return sum(int((batch.rows >= 0).sum()) for batch in loader)


def tails(folder: Path) -> object:
    """8 small JPEGs, behind each a hole of a gigabyte less one byte."""
    for k in range(8):
        (folder / str(k % 2)).mkdir(exist_ok=True)
        with open(folder / str(k % 2) / f"{k}.jpg", "wb") as file:
            file.write(jpeg())
            file.truncate(GIGA - 1)
    return _one_epoch(folder)


def large_pictures(folder: Path) -> object:
    """8 PNGs of 63 megapixels, 0.2 MB each."""
    out = io.BytesIO()
    Image.new("RGB", (7900, 7950), (9, 8, 7)).save(out, "PNG")
    for k in range(8):
        (folder / str(k % 2)).mkdir(exist_ok=True)
        (folder / str(k % 2) / f"{k}.png").write_bytes(out.getvalue())
    return _one_epoch(folder)


def sparse_bitmaps(folder: Path) -> object:
    """8 BMPs of 44 megapixels that take no room on the disk."""
    header = (
        b"BM" + struct.pack("<IHHI", 0, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 7900, 5600, 1, 24, 0, 0, 0, 0, 0, 0)
    )
    for k in range(8):
        (folder / str(k % 2)).mkdir(exist_ok=True)
        with open(folder / str(k % 2) / f"{k}.bmp", "wb") as file:
            file.write(header)
            file.truncate(54 + 23700 * 5600)
    return _one_epoch(folder)


READ = ("large_pictures", "sparse_bitmaps")
"""What is no fault, only large; each wants a process of its own, for memory that was used is not given back."""
BOMBS: dict[str, Callable[[Path], object]] = {
    bomb.__name__: bomb
    for bomb in (
        npz, npz_of_lies, h5, h5_crash, torch_zip, torch_views, torch_hash, caffemodel, t7, t7_views, safetensors,
        safetensors_hole, model, model_as_source, model_of_empty_tensors, json_parts, bin_lists, bin_memo, bin_bytes,
        bin_tuples, saved_index, tar_of_brackets, table_of_one_line, table_of_cells, pairs_of_short_lines,
        idx_of_one_line, tails, large_pictures, sparse_bitmaps,
    )
}  # fmt: skip


def main(folder: str, *names: str) -> None:
    """Reads bombs one after the other and prints what each came to, as a line of JSON."""
    warnings.simplefilter("ignore")
    for name in names:
        place = Path(folder) / name
        place.mkdir()
        reset_peak()
        began, found = time.monotonic(), {"name": name}
        try:
            found["value"] = repr(BOMBS[name](place))[:200]
        except (ValueError, StorageError) as error:
            found["error"] = str(error)
        peak = max(peak_bytes(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10)
        print(json.dumps(found | {"peak": peak, "seconds": time.monotonic() - began}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
