"""python bench.py train: how fast the default objective trains, beside the same written plainly on transformers and peft,
and beside what the machine's matrix products allow."""
import statistics
import time

import torch
import torch.nn.functional as F

from objective import TERMS, pad

NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Peer:
    """The objective as one would write it first: transformers' model with peft's LoRA, the original model by
    disable_adapter, padded batches, and logits of every position."""

    def __init__(self, reference, config, flag_id):
        import peft
        n, layers = reference.config.num_hidden_layers, config.layers
        reference.resize_token_embeddings(flag_id + 1)
        lora = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=NAMES,
                               layers_to_transform=list(range(n - layers, n)) if layers else None)
        self.model = peft.get_peft_model(reference, lora)
        self.flag_row = torch.zeros(reference.config.hidden_size, requires_grad=True)
        self.flag_id, self.config = flag_id, config
        self.parameters = [p for p in self.model.parameters() if p.requires_grad] + [self.flag_row]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-6, weight_decay=0.0)

    def logits(self, rows):
        ids = pad(rows, self.flag_row.device)
        mask = pad([[1] * len(r) for r in rows], self.flag_row.device)
        hidden = self.model.get_base_model().model(ids, attention_mask=mask, use_cache=False).last_hidden_state
        words = self.model.get_base_model().lm_head(hidden)[..., :self.flag_id].float()             # (B, T, V)
        return torch.cat([words, (hidden.float() @ self.flag_row)[..., None]], -1)                  # (B, T, V + 1)

    def step(self, layouts):
        config = self.config
        count = torch.tensor([t for x in layouts for t in x.terms]).sum(0)
        weights = torch.tensor([getattr(config, t) for t in TERMS]) / count.clamp(min=1)
        self.optimizer.zero_grad()
        for i in range(0, len(layouts), config.micro_batch):
            self.loss(layouts[i:i + config.micro_batch], weights).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, config.clip)
        self.optimizer.step()

    def loss(self, part, weights):
        with torch.no_grad(), self.model.disable_adapter():
            p0 = self.logits([x.reference_ids for x in part])[..., :self.flag_id].log_softmax(-1)   # (B, T, V)
        log_pi = self.logits([x.ids for x in part]).log_softmax(-1)                                  # (B, T, V + 1)
        total = 0
        for b, x in enumerate(part):
            log_p, log_p0 = log_pi[b, x.at], p0[b, x.reference_at]
            log_f, log_not_f = log_p[:, -1], torch.log1p(-log_p[:, -1].exp())
            kl_pi = F.kl_div(log_p[:, :-1], log_p0, log_target=True, reduction="none").sum(-1)
            losses = torch.stack([kl_pi, -log_f, kl_pi, kl_pi + log_not_f], -1)
            total = total + (losses * torch.tensor(x.terms) * weights).sum()
        return total
