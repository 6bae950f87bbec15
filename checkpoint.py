"""Files: Hugging Face style folders of safetensors, read strictly and without a second copy in memory; the adapter;
and the machine that they go to."""
import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file


def read_json(path):
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"no {path}: wanted a folder with config.json, tokenizer and safetensors weights") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise ValueError(f"cannot read {path}: {e}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: wanted a JSON object, found {type(value).__name__}")
    return value


def weight_files(path):
    """Tensor name -> file, from the index of shards or the one file."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
            raise ValueError(f"{index}: wanted weight_map to be an object, tensor name -> file name")
        return {name: path / file for name, file in names.items()}
    return {name: path / "model.safetensors" for name in open_weights(path / "model.safetensors").keys()}


def open_weights(file):
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as e:
        raise ValueError(f"cannot read {file}: {e} (is it there, and whole?)") from None


def load_weights(model, path):
    """Fills the model's parameters, strictly: every tensor there, no other, each of its shape."""
    files = weight_files(path)
    handles = {file: open_weights(file) for file in set(files.values())}
    for name, file in files.items():
        if name not in handles[file].keys():
            raise ValueError(f"{file}: tensor {name} is missing, though model.safetensors.index.json puts it there")
    for file, handle in handles.items():
        for name in handle.keys():
            if files.get(name) != file:
                raise ValueError(f"{file}: holds tensor {name}, which model.safetensors.index.json does not put there")
    shapes = {name: handles[file].get_slice(name).get_shape() for name, file in files.items()
              if not name.endswith("rotary_emb.inv_freq")}  # old files keep this derived buffer
    wanted = weight_names(model)
    if model.config.tie_word_embeddings and {"lm_head.weight", "model.embed_tokens.weight"} <= set(shapes):
        # written out by some, though tied
        a, b = (handles[files[n]].get_tensor(n) for n in ("lm_head.weight", "model.embed_tokens.weight"))
        if not torch.equal(a, b):
            raise ValueError(f"{path}: tie_word_embeddings is true, but lm_head.weight is not embed_tokens.weight")
        del shapes["lm_head.weight"], a, b
    check_tensors(shapes, {name: list(p.shape) for name, p in wanted.items()}, path)
    del handles
    with torch.no_grad():
        # the largest first, while the model's own memory is still untouched: its mapped pages come on top
        for name, parameter in sorted(wanted.items(), key=lambda item: -item[1].numel()):
            # opened anew for each tensor: closing gives the mapped pages back, so that memory stays near 1x
            file = open_weights(files[name])
            if hasattr(parameter, "to_local"):  # one of several processes, and these rows are all that it reads
                begin, n = own_rows(parameter)
                parameter.to_local().copy_(file.get_slice(name)[begin:begin + n] if n else torch.empty(0))
            else:
                parameter.copy_(file.get_tensor(name))


def own_rows(tensor):
    """(first row, number of rows) that this process holds of a tensor cut along its rows (DTensor)."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return offset[0], shape[0]


def whole(tensor):
    """A tensor put together if several processes hold a part each; then all of them have to call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def part_like(parameter, tensor):
    """A whole tensor cut as the parameter is, or as it is."""
    if not hasattr(parameter, "to_local"):
        return tensor
    from torch.distributed.tensor import distribute_tensor
    # None: each process cuts the tensor that it has, nothing is sent
    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements,
                             src_data_rank=None)


@torch.no_grad()
def fill(parameter, tensor):
    """Sets a parameter, of which several processes may hold a part each, to a whole tensor."""
    parameter.copy_(part_like(parameter, tensor))


def weight_names(model):
    """Name in the files -> parameter of the model, what add_flag has added left out."""
    own = {n: p for n, p in model.named_parameters() if not n.startswith(("flag_", "kind_")) and "lora_" not in n}
    return {("" if n.startswith("lm_head") else "model.") + n: p for n, p in own.items()}


def write_folder(folder, source, tensors, files=(), **changes):
    """A Hugging Face folder: model.safetensors with `tensors` (name -> tensor), config.json of the folder `source` with
    the fields `changes`, and the other files of `source`, its tokenizer's above all; `files` (name -> JSON object) come
    in their place. Errors as for new_folder."""
    source = Path(source)
    with new_folder(folder) as made:
        for file in source.iterdir():
            if file.is_file() and not re.search(r"\.(safetensors|bin|pth|gguf)(\.index\.json)?$", file.name):
                shutil.copy(file, made)
        for name, value in {**dict(files), "config.json": read_json(source / "config.json") | changes}.items():
            (made / name).write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, made / "model.safetensors",
                  metadata={"format": "pt"})


@contextlib.contextmanager
def new_folder(folder):
    """A folder to write files into; at the end it becomes `folder`, whole, by one rename. Raises ValueError where that
    exists, or where something cannot be written: then nothing is left."""
    check_new(folder)
    folder = Path(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unfinished-") as tmp:
            made = Path(tmp) / "made"
            made.mkdir()
            yield made
            os.replace(made, folder)
    except (OSError, SafetensorError) as e:
        raise ValueError(f"cannot write {folder}: {e} (is there room on the disk?); nothing is left of it") from None


def check_new(folder):
    """ValueError where a folder that is to be written has something in it already."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already: name another folder, or take it away first")


def check_tensors(found, wanted, where):
    """Raises one ValueError naming every tensor missing, extra or misshapen (name -> shape, as lists)."""
    problems = [f"{n} is missing" for n in wanted if n not in found]
    problems += [f"{n} is not part of this model" for n in found if n not in wanted]
    problems += [f"{n} is {found[n]}, wanted {wanted[n]}" for n in wanted if n in found and found[n] != wanted[n]]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{where}: " + "; ".join(problems[:5]) + more)


def weights_hash(path):
    """SHA-256 over every tensor's name, dtype, shape and bytes: the same for one file and for shards."""
    digest = hashlib.sha256()
    for name, file in sorted(weight_files(Path(path)).items()):
        tensor = open_weights(file).get_tensor(name)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def write_adapter(folder, tensors, info):
    """flag.safetensors and flag.json in `folder`, each by a temporary name and a rename. Of an adapter that is there
    already flag.json goes first: killed at any moment, this leaves the old one, none, or the new one, never a mix."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "flag.safetensors.tmp")
    (folder / "flag.json.tmp").write_text(json.dumps(info, indent=1), encoding="utf-8")
    (folder / "flag.json").unlink(missing_ok=True)
    for name in ("flag.safetensors", "flag.json"):
        os.replace(folder / f"{name}.tmp", folder / name)


def read_adapter(folder, weights, force=False):
    """(tensors, info) of an adapter; ValueError where it is missing or damaged, or, unless `force`, where the weights
    in the folder `weights` are not those that it was trained on."""
    folder = Path(folder)
    if not (folder / "flag.json").is_file():
        raise ValueError(f"no adapter in {folder}: flag.json is missing; train one first (python train.py --init "
                         "llama) or name its folder")
    info = read_json(folder / "flag.json")
    number = lambda x: isinstance(x, (int, float))
    good = {"n_flags": lambda x: isinstance(x, int) and x >= 1, "rank": lambda x: isinstance(x, int) and x >= 0,
            "alpha": number, "threshold": lambda x: x is None or number(x), "base_sha256": lambda x: isinstance(x, str)}
    newer = {"layers": lambda x: isinstance(x, int) and x >= 0, "debounce": lambda x: isinstance(x, int) and x >= 1}
    good |= {k: right for k, right in newer.items() if k in info}  # older adapters lack them
    problems = [f"lacks {k}" if k not in info else f"{k} is {info[k]!r}" for k, right in good.items()
                if k not in info or not right(info[k])]
    if problems:
        raise ValueError(f"{folder / 'flag.json'}: " + ", ".join(problems))
    seen = weights_hash(weights)
    if seen != info["base_sha256"] and not force:
        raise ValueError(f"the adapter in {folder} was trained on other base weights (SHA-256 {info['base_sha256'][:12]}"
                         f"..., these have {seen[:12]}...): name the folder of those weights, or pass --force / "
                         "force=True")
    try:
        return load_file(folder / "flag.safetensors"), info
    except (OSError, SafetensorError) as e:
        raise ValueError(f"cannot read {folder / 'flag.safetensors'}: {e} (is it there, and whole?)") from None


def pick_device():
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_dtype(device, many=False):
    """bf16 where the machine multiplies in it, else fp32 (bf16 emulated on a CPU is slower than fp32). One token at a time
    fetching the weights is what takes long, and those of bf16 are half as large. With `many`, for training and evaluation,
    it is the products: there Intel's AVX512_BF16 without AMX comes to half the speed of fp32 (144 and 250 GFLOP/s on two
    cores of one), where two cores of AMD's (the CPUs with SSE4a) reached 900."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    cpu = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    vector = cpu.get("avx512_bf16") and (not many or cpu.get("sse4a"))
    return torch.bfloat16 if vector or cpu.get("amx_bf16") else torch.float32
