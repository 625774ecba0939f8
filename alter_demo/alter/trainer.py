"""Phase two on transformers' Trainer: any method of the table, with ALTER's routes in place."""

import torch

from ..data.batches import model_inputs
from ..models.fine_tuning import AnswerTrainer
from . import DEFAULT_Q
from .dataset import batch_plan
from .frozen import PhaseOneResult
from .losses import FORGET, REFUSAL, RETAIN, LossInputs
from .tuner import routing_state


class UnlearnTrainer(AnswerTrainer):
    """Trains by the losses of `method`. Frozen outputs route the samples: one pass a step.

    Args:
        weights: part of the loss -> TrainingConfig field.
    """

    def __init__(self, *args, phase_one: PhaseOneResult, config, method, weights, **kwargs):
        super().__init__(*args, **kwargs)
        self.phase_one, self.config, self.method, self.weights = phase_one, config, method, weights
        self.losses = method.loss_functions()
        self.parts: dict[str, float] = {}  # the last step's losses, unweighted

    def create_optimizer(self, *args, **kwargs):
        if self.optimizer is None:
            training = self.config.training
            rates = [("alter_A", training.lr_a), ("alter_B", training.lr_b), ("", training.lr)]
            groups: dict[float, list] = {}
            for name, p in self.model.named_parameters():
                if p.requires_grad:
                    groups.setdefault(next(lr for key, lr in rates if key in name), []).append(p)
            self.optimizer = torch.optim.AdamW(
                [{"params": p, "lr": lr} for lr, p in groups.items()],
                weight_decay=0.01 if self.method.trainable.changes_weights else 0.0,
                fused=True,
            )
        return self.optimizer

    def compute_loss(self, model, batch, return_outputs=False, num_items_in_batch=None):
        frozen = [self.phase_one.frozen[i] for i in batch["index"]]
        alter, layer = self.phase_one.alter, self.phase_one.steering_layer
        if alter is not None:
            # stays set until the next step: gradient checkpointing runs the layers again in the
            # backward pass
            plan = batch_plan(frozen, batch, alter)
            adapter = self.config.adapter
            if self.method.uses_entropy and adapter.isolation:
                plan = plan.isolate_gradients(batch["label"], adapter.entropy_mask)
            routing_state(model).plan = plan
        steered = layer is not None
        options = {"logits_to_keep": batch["keep"], "output_hidden_states": steered}
        out = model(**model_inputs(batch), **options, use_cache=False)
        answer = batch["answer"]  # (B, K)
        logits = out.logits[:, :-1][answer]  # (n, V)
        inputs = self.loss_inputs(batch, frozen, logits)
        if steered:
            states = out.hidden_states[layer][:, -answer.shape[1] - 1 : -1]
            inputs.hidden = states[answer].float()
            frozen_hidden = torch.cat([f.answer_hidden for f in frozen])
            inputs.frozen_hidden = frozen_hidden.to(logits.device, torch.float32)
        training = self.config.training
        parts = {name: loss(inputs, training) for name, loss in self.losses.items()}
        self.parts = {name: value.item() for name, value in parts.items() if value.requires_grad}
        total = sum(getattr(training, self.weights[name]) * value for name, value in parts.items())
        return (total, {"logits": logits}) if return_outputs else total

    def loss_inputs(self, batch: dict, frozen, logits: torch.Tensor) -> LossInputs:
        answer, device, alter = batch["answer"], logits.device, self.phase_one.alter
        rows = torch.arange(len(frozen), device=device)[:, None].expand(-1, answer.shape[1])
        row, labels = rows[answer], batch["labels"][answer]
        role = torch.where(batch["label"] > 0, FORGET, RETAIN)

        def concatenate(name: str) -> torch.Tensor:
            return torch.cat([getattr(f, name) for f in frozen]).to(device)

        entropy = torch.cat([f.entropy[-1 - len(f.log_p) : -1] for f in frozen]).to(device)
        return LossInputs(
            logits=logits,
            labels=labels,
            row=row,
            role=torch.where(batch["refusal"], REFUSAL, role),
            sub_domain=batch["label"][row],
            is_end=labels == self.processing_class.eos_token_id,
            frozen_log_p=concatenate("log_p"),
            top_ids=concatenate("top_ids"),
            top_log_p=concatenate("top_log_p"),
            entropy=entropy,
            high_entropy=entropy > (alter.threshold if alter else float("inf")),
            q=alter.q if alter else DEFAULT_Q,
        )
