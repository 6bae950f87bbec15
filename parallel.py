"""Several processes on one run: start-up, data parallel or sharded, gathering, checkpoints. All by PyTorch's own engine.

    torchrun --nproc-per-node 8 train.py ...            # each holds the model: DistributedDataParallel
    torchrun --nproc-per-node 8 train.py --shard ...    # each holds a part of it: FSDP2's fully_shard

All processes run the same lines in the same order; a Team's methods are what they do together, and so each is called
by all of them. Without torchrun the team is one process, and nothing here is more than a plain call.
"""
import contextlib
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_map

from checkpoint import fill, part_like, pick_device, whole
from model import Llama


class Root(nn.Module):
    """A model with whatever is done with it as its forward: there DDP and FSDP have their hooks."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, work, *args):
        return work(self.model, *args)


class Team:
    """The processes of a run; this one has number `rank` of `size`. Joins the others that torchrun has started."""

    def __init__(self, device="auto", shard=False):
        self.rank, self.size = (int(os.environ.get(name, alone)) for name, alone in (("RANK", 0), ("WORLD_SIZE", 1)))
        self.first, self.shard = self.rank == 0, shard
        self.device = pick_device() if device == "auto" else torch.device(device)
        if "RANK" not in os.environ:
            if shard:
                raise ValueError("--shard is for several processes: torchrun --nproc-per-node N train.py --shard ...")
            return
        if self.device.type not in ("cuda", "cpu"):
            raise ValueError(f"several processes on {self.device}: wanted cuda, or --device cpu")
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def leave(self):
        """The last call of a run: of several processes, each ends here, with exit code 0."""
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
            # Gloo's threads live on and free tensors late. One that finds Python ending aborts the whole process, 1 run
            # in 10 on a busy machine ("terminate called without an active exception"): so Python does not get to end.
            sys.stdout.flush()
            os._exit(0)

    # ------------------------------------------------------------------------------------------- the model

    def load(self, path, dtype, adapter):
        """Makes the model in the folder `path` the team's, with the flag added (`adapter`: add_flag's arguments)."""
        def cut(model):
            model.add_flag(**adapter)
            return self.take_parts(model)

        model = Llama.from_pretrained(path, dtype, self.device, cut if self.shard else None)
        if self.shard:
            return model.start_flag(adapter["seed"])
        model.add_flag(**adapter)
        self.take(model)

    def take(self, model):
        """This model, whole in every process, is the team's from now on. Returns the team."""
        self.model, self.root = model, Root(model)
        self.trained = self.root
        if self.size > 1:
            self.trained = nn.parallel.DistributedDataParallel(self.root, forward_sync_buffers=False)
        return self

    def take_parts(self, model):
        """Cuts a model that has no memory yet (meta device): every process gets its rows of each tensor. Blocks are put
        together one by one when they are used, what is outside of them (embedding, head) for as long as the root's
        forward lasts. Returns the module that is to be given memory."""
        from torch.distributed.fsdp import fully_shard
        mesh = dist.init_device_mesh(self.device.type, (self.size,))
        for block in model.layers:
            fully_shard(block, mesh=mesh)
        self.model = model
        self.root = self.trained = fully_shard(Root(model), mesh=mesh, reshard_after_forward=True)
        return self.root

    # -------------------------------------------------------------------------------------------- the work

    def share(self, items):
        return items[self.rank::self.size]

    def gradients(self, work, parts):
        """Adds the gradients of work(model, part) -> (loss, sums) over this process's parts, as many as any other has,
        and over the processes; returns the sums added up in the same way."""
        total = 0
        for i, part in enumerate(parts):
            waits = isinstance(self.trained, nn.parallel.DistributedDataParallel) and i + 1 < len(parts)
            with self.trained.no_sync() if waits else contextlib.nullcontext():
                loss, sums = self.trained(work, part)
                (loss * self.size).backward()  # both engines take the mean over the processes
            total = total + sums
        if self.size > 1:
            dist.all_reduce(total)
        return total

    @torch.no_grad()
    def spread(self, work, parts):
        """Gives work(model, part) for each of the parts, in order, each done by one process. The results are sent to
        all, so they are plain values or tensors on the CPU; no part may take more model calls than another."""
        for i in range(0, len(parts), self.size):
            # the last round too is made by all: a sharded model is only put together by all of them
            mine = self.root(work, parts[min(i + self.rank, len(parts) - 1)])
            found = [mine] + [None] * (self.size - 1)
            if self.size > 1:
                dist.all_gather_object(found, mine)
            yield from found[:len(parts) - i]

    def agree(self, tensor):
        """The first process's tensor."""
        if self.size > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    # ----------------------------------------------------------------------------------------- checkpoints

    def save(self, path, optimizer, tensors, **info):
        """Writes one checkpoint of the whole run: `tensors` (name -> tensors by name), the optimizer's state, `info`.
        It does not say how many processes there were, and any number may go on with it."""
        state = {"optimizer": optimizer.state_dict(), "tensors": tensors}
        state = tree_map(lambda x: whole(x.detach()).cpu() if isinstance(x, torch.Tensor) else x, state)
        if self.first:
            tmp = path.with_name(path.name + ".tmp")
            torch.save(state | info, tmp)
            os.replace(tmp, path)

    def read(self, path):
        """What `save` wrote, read by the first process for all; None where there is none."""
        found = [None]
        if self.first and path.exists():
            try:
                found = [torch.load(path, weights_only=True, map_location="cpu")]
            except Exception as e:  # torch.load raises whatever a damaged file makes it stumble over
                raise ValueError(f"cannot read {path} ({type(e).__name__}): --fresh begins anew") from None
        if self.size > 1:
            dist.broadcast_object_list(found, src=0)
        return found[0]

    def restore(self, state, optimizer, tensors):
        with torch.no_grad():
            for kind, named in tensors.items():
                for name, tensor in named.items():
                    fill(tensor, state["tensors"][kind][name])
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        for i, moments in state["optimizer"]["state"].items():
            for name, x in moments.items():
                if x.shape == trained[i].shape:  # not so for the count of steps
                    moments[name] = part_like(trained[i], x)
        optimizer.load_state_dict(state["optimizer"])
