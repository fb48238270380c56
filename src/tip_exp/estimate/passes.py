"""What a rank holds beside weights and moments while the teacher reads, the student scores and the student learns.

Formulas of one micro-batch are in `activations`; here they are put together for a run: which micro-batch is the
fullest, what is gathered, and what lives at the same time.
"""

from __future__ import annotations

import math
from functools import cached_property

from tip_exp.config.schema import RunConfig
from tip_exp.estimate import activations
from tip_exp.estimate.activations import BatchSize, largest_micro_batch
from tip_exp.estimate.shapes import shape_of

BYTES = {"float32": 4, "bfloat16": 2}


class Passes:
    """The three passes of one of `ranks` ranks; all sizes are bytes."""

    def __init__(self, config: RunConfig, ranks: int, *, on_gpu: bool, activation_bytes: float | None = None) -> None:
        self.config, self.ranks, self.on_gpu, self.activation_bytes = config, ranks, on_gpu, activation_bytes
        pair, learner = config.pair, config.learner
        self.teacher, self.student = (shape_of(m.path, m.revision) for m in (pair.teacher, pair.student))
        self.teacher_width, self.student_width = BYTES[pair.teacher.dtype], BYTES[pair.student.dtype]
        self.width = min(self.student_width, BYTES[learner.compute_dtype])
        self.vocab_size = min(self.teacher.vocab_size, self.student.vocab_size)
        self.shards = max(1, ranks // learner.replicas)
        self.offload = pair.teacher.placement == "offload" and on_gpu
        self.gathers = ranks > 1 or self.width != self.student_width
        self.rollouts = math.ceil(learner.prompts_per_step * learner.samples_per_prompt / ranks)

    @cached_property
    def batch(self) -> BatchSize:
        return largest_micro_batch(self.config, self.rollouts)

    @cached_property
    def trained(self) -> float:
        """Bytes of the trained parameters, all shards together."""
        lora = self.config.pair.student.lora
        if lora is None:
            return self.student.parameters * self.student_width
        return activations.adapter_parameters(self.student, lora) * activations.FLOAT32

    def teacher_pass(self) -> dict[str, float]:
        batch, width = self.batch, self.teacher_width
        if (privileged := self.config.pair.privileged) is not None:  # another prompt before the same responses
            response = batch.tokens / batch.sequences
            length = min(self.config.learner.micro_batch_tokens, privileged.max_tokens + round(response))
            batch = BatchSize(batch.sequences, length, batch.tokens)
        passes = {"temporaries": activations.forward_bytes(self.teacher, batch.positions, width)}
        if self.ranks > 1:
            passes["gathered layers"] = 2 * self.teacher.layer * width
        elif self.offload:  # without shards all layers come from the host at once
            passes["gathered layers"] = self.teacher.layers * self.teacher.layer * width
        return passes | self._whole_vocabulary(("teacher",))

    def _whole_vocabulary(self, roles: tuple[str, ...] = ("student", "teacher")) -> dict[str, float]:
        """Embeddings and output heads of both models or of one, whole."""
        student = self.student.vocabulary * self.width if self.gathers and "student" in roles else 0
        teacher = self.teacher.vocabulary * self.teacher_width if self.ranks > 1 and "teacher" in roles else 0
        return {"whole vocabulary matrices": student + teacher} if student + teacher else {}

    def _tiles(self, tokens: float, *, whole_rows: bool, blocks: int = activations.NUM_SCRATCH) -> float:
        device = "cuda" if self.on_gpu else "cpu"
        options = {"whole_rows": whole_rows, "blocks": blocks, "device": device}
        size = activations.tile_bytes(self.config, tokens, self.vocab_size, **options)
        if not self.on_gpu:  # a CPU converts some rows of a 16-bit head
            models = (self.student, self.width), (self.teacher, self.teacher_width)
            widest = max((model.hidden for model, width in models if width != activations.FLOAT32), default=0)
            size += activations.CONVERTED_ROWS * activations.FLOAT32 * widest
        return size

    def _hidden(self) -> float:
        """Bytes of a micro-batch's hidden states at the response tokens; the teacher's are copied to a GPU."""
        copied = self.teacher.hidden * self.teacher_width if self.on_gpu else 0
        return self.batch.tokens * (self.student.hidden * self.width + copied)

    def _kept(self) -> tuple[float, float]:
        learner = self.config.learner
        options = {"packed": learner.packing, "checkpointing": learner.activation_checkpointing}
        return activations.kept_for_backward(
            self.student, self.batch, self.width, counted=self.activation_bytes, **options
        )

    @property
    def _single_batch(self) -> bool:
        """Whether the rank's share is one micro-batch, so that the graph of pass 1 serves pass 2."""
        return self.rollouts <= self.batch.sequences

    def score_pass(self) -> dict[str, float]:
        passes = activations.forward_bytes(self.student, self.batch.positions, self.width)
        kept = self._kept()[0] if self._single_batch else 0
        diagnostics = self.config.learner.diagnostics_every > 0
        blocks = activations.NUM_SCRATCH + (diagnostics and not self.on_gpu)  # on a CPU the gradient's norm takes one
        tiles = self._tiles(self.batch.tokens, whole_rows=diagnostics, blocks=blocks)
        if diagnostics:
            tiles += activations.top_k_bytes(self.config, self.batch.tokens, self.vocab_size)
        scoring = max(passes, self._hidden() + tiles)
        gathered = {"gathered layers": 2 * self.student.layer * self.width} if self.gathers else {}
        return {"activations": kept, "logits and temporaries": scoring} | gathered | self._whole_vocabulary()

    def backward_pass(self) -> dict[str, float]:
        learner, student = self.config.learner, self.student
        if learner.loss_backend == "materialized":
            loss = activations.materialized_bytes(self.config, self.teacher, student, self.batch.tokens, self.width)
        else:
            columns = learner.estimator == "full" and learner.divergence in activations.CLOSED_FORM_KL
            blocks = activations.NUM_SCRATCH if columns else activations.autograd_copies(learner)
            kept = self.batch.tokens * self.config.selector.retention
            loss = self._tiles(kept, whole_rows=not columns, blocks=blocks)
        loss += self.batch.tokens * student.hidden * self.width  # the gradient of the hidden states
        kept, recomputed = self._kept()
        passes = recomputed + activations.backward_bytes(student, self.batch.positions, self.width)
        full = self.config.pair.student.lora is None
        vocabulary = student.vocabulary * self.student_width if full else 0
        gradients = (self.trained - vocabulary) / self.shards
        if self._single_batch and not self.gathers:
            gradients = 0  # the layers' replace activations one by one
        if not self.gathers:
            gradients += vocabulary
        parts = {"gradients": gradients, "activations": kept, "micro-batch hidden states": self._hidden()}
        parts["logits and temporaries"] = max(loss, passes)
        if self.gathers:  # and a layer's gradient, before it is summed in float32
            parts["gathered layers"] = student.layer * (2 * self.width + self.width + activations.FLOAT32)
        return parts | self.whole_gradients() | self._whole_vocabulary()

    def whole_gradients(self) -> dict[str, float]:
        """Float32 gradients of embedding and head, whole on each rank until they are summed."""
        if not self.gathers or self.config.pair.student.lora is not None:
            return {}
        return {"whole vocabulary gradients": self.student.vocabulary * activations.FLOAT32}
