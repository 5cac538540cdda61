"""The training loop: batches, balanced steps, averaged weights, validation, checkpoints, log.

A step depends only on the configuration, the data and its number (order, augmentation and dropout are drawn
from streams seeded by them), so a run that was stopped continues bit for bit on the same machine, with as many
processes and threads, where epochs and not minutes decide the learning rate and no CUDA graph is asked for. Not for
task weights (`balance.py`), the update (`step.py`), batches (`batches.py`), file formats (`checkpoint.py`) or drawing
progress bars (the command line).
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import dataclasses
import math
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from xrdfast.data.generate import PatternSource
from xrdfast.data.mixtures import draw_one_and_two
from xrdfast.data.store import PatternStore
from xrdfast.errors import InputError
from xrdfast.evaluation import evaluate_predictions
from xrdfast.models import PRESETS, build_model, model_path
from xrdfast.posterior import Calibration, fit_calibration, joint_posterior
from xrdfast.suspicion import fit_several_phases, pattern_shape, phase_features
from xrdfast.symmetry import N_CLASSES, class_index
from xrdfast.training import checkpoint
from xrdfast.training.balance import Balance, logit_offsets
from xrdfast.training.batches import Batches, seed_of
from xrdfast.training.config import RunConfig, TrainConfig
from xrdfast.training.distill import Distiller, check_teacher
from xrdfast.training.processes import Processes, local_device, stop_on_signals
from xrdfast.training.run_log import ProgressCallback, RunLog, StepWindow
from xrdfast.training.step import TrainingStep, autocast

CONFIG_FILE = "config.toml"

# Settings that may change when a run is resumed. Threads decide the order of sums, so last bits; the others nothing.
_FREE_ON_RESUME = frozenset(
    {"train.checkpoint_minutes", "train.log_steps", "train.tensorboard", "train.threads"}
)
_EVALUATION_BATCH = 128
_PHASE_PATTERNS = 32_768  # to fit the suspicion of several phases: AUROC 0.81 on others, with a quarter 0.80
_RECALIBRATION_PATTERNS = 1024  # enough for means and variances; 20 s of the paper preset on two cores


class RunResult(NamedTuple):
    """How a run ended."""

    status: str  # "finished", "stopped_early" (patience) or "interrupted" (by a signal; resumable)
    step: int
    # Of the best model on the validation folds: "step", "top1" and "loss" by task, and, unless interrupted,
    # everything of `xrdfast.evaluation.evaluate_predictions`; {} before the first validation.
    metrics: dict[str, Any]


class Trainer:
    """Trains one model in one folder.

    The folder receives `config.toml` (resolved), `log.jsonl`, `model.safetensors` (averaged weights, best
    space-group top-1 on the validation folds) and `last.safetensors` (everything a resume needs). Under
    torchrun each process takes its share of every batch, and gradients are averaged over processes.

    Args:
        config: the run.
        out_dir: created where missing.
        resume: continue the run found in `out_dir`, or start one where there is none.
        progress: called with every record of the log (first process only).

    Raises:
        InputError: for stores or a checkpoint that do not fit the configuration, or a folder that holds
            another run.

    Note:
        Flushes subnormal numbers and sets the thread count for the whole process.
    """

    def __init__(
        self,
        config: RunConfig,
        out_dir: str | Path,
        *,
        resume: bool = False,
        progress: ProgressCallback | None = None,
    ) -> None:
        self.config = config
        self.out_dir = Path(out_dir)
        self._report = progress
        train = config.train
        torch.set_flush_denormal(True)  # decaying averages end in subnormals, which cost ten times the time
        if train.threads:
            torch.set_num_threads(train.threads)
        self.device = local_device(train.device)
        self._processes = Processes(self.device)

        self.store = PatternStore.open(config.data.stores)
        self.store.verify()
        self.source = PatternSource(self.store, augment=config.augment, device=self.device)
        self.training, self.validation = self.store.split(
            config.data.folds_validation, clean=config.data.clean
        )
        self._check_sizes()
        self._batches = Batches(self.source, self.training, train, self._processes)
        self.steps_per_epoch = self._batches.steps_per_epoch

        torch.manual_seed(train.seed)
        self.model = build_model(config.model.preset).to(self.device).train()
        self.averaged = copy.deepcopy(self.model).eval().requires_grad_(False)
        distills = config.distillation.active
        if config.distillation.teacher:
            check_teacher(
                config.distillation.teacher,
                config.data.folds_validation,
                config.augment,
                self.store.simulation.wavelength,
                config.data.stores,
            )
        self.distiller = Distiller(config.distillation, self.model) if distills else None
        self._named_parameters = list(self.model.named_parameters())
        if self.distiller is not None:
            self._named_parameters += self.distiller.named_parameters()
        self._parameters = [parameter for _, parameter in self._named_parameters]
        self.objectives = self.model.tasks
        if self.distiller is not None and self.distiller.own_objective:
            self.objectives = (*self.objectives, "distillation")
        self.balance = Balance(train.balance, len(self.objectives), self.device)
        self._class_index = {task: torch.tensor(class_index(task)) for task in self.model.tasks}
        self._offsets: dict[str, Tensor] | None = None  # of the logits, in training
        if train.logit_adjustment:
            counts = self.store.group_counts(self.training).double()
            drawn = torch.where(counts > 0, counts.pow(1.0 - train.class_balance), 0.0)
            offsets = logit_offsets(drawn, train.logit_adjustment, self.model.tasks)
            self._offsets = {task: self._moved(rows) for task, rows in offsets.items()}
        self._update = TrainingStep(
            self.model,
            self._parameters,
            self.balance,
            weight_decay=train.weight_decay,
            betas=train.betas,
            label_smoothing=train.label_smoothing,
            clip_norm=train.clip_norm,
            bf16=train.precision == "bf16",
            extra=self.distiller,
            offsets=self._offsets,
            graphed=train.cuda_graph,
        )
        self.optimizer = self._update.optimizer

        self.step = 0
        self.elapsed = 0.0  # seconds of all sittings
        self.fraction = 0.0  # of the run that is done, 0..1
        self.best: dict[str, Any] = {}  # metrics of the best validation
        self.worse_validations = 0  # since the best one
        self._begun = time.monotonic()  # when this run would have begun in one sitting
        self._log: RunLog | None = None
        self._stop_requested = False  # by a signal to this process
        self._stop_agreed = False  # by all processes, in their last step
        self._elapsed_agreed = 0.0  # the first process's clock, at the last step
        self._open_folder(resume)

    def run(self) -> RunResult:
        """Trains to the end, or until SIGINT or SIGTERM (the step in progress is finished and saved)."""
        train = self.config.train
        with contextlib.ExitStack() as stack:
            stack.callback(self._processes.leave)
            stack.callback(self._batches.close)
            if self._processes.rank == 0:
                log = RunLog(self.out_dir, tensorboard=train.tensorboard, report=self._report)
                self._log = stack.enter_context(log)
            stack.enter_context(stop_on_signals(self._request_stop))
            self._begun = time.monotonic() - self.elapsed
            self._write(
                "start",
                preset=self.config.model.preset,
                parameters=sum(parameter.numel() for parameter in self._parameters),
                training_patterns=len(self.training),
                validation_patterns=len(self.validation),
                device=str(self.device),
                threads=torch.get_num_threads(),
                processes=self._processes.count,
            )
            status = self._loop()
            metrics = self.best if status == "interrupted" else self._finish_model()
            self._write("end", status=status, metrics=metrics)
        return RunResult(status, self.step, metrics)

    def _loop(self) -> str:
        train = self.config.train
        window = StepWindow(self.objectives, self.device)
        saved = self._elapsed_agreed
        patience = train.early_stopping_patience
        while True:
            if patience and self.worse_validations >= patience:
                return "stopped_early"
            if self.fraction >= 1.0:
                return "finished"
            window.add(*self._train_step())
            done = self.fraction >= 1.0
            if self.step % train.log_steps == 0 or done:
                self._write("step", **window.take(train.batch_size), learning_rate=self._learning_rate())
            validates = self.step % (self.steps_per_epoch * train.validate_epochs) == 0 or done
            if validates:
                begun = time.monotonic()
                self._validate()
                window.leave_out(time.monotonic() - begun)
            stops = self._stop_agreed or (self._stop_requested and self._processes.count == 1)
            # By the clock that all processes share, since they save together.
            if validates or stops or self._elapsed_agreed - saved >= 60.0 * train.checkpoint_minutes:
                self.save()
                saved = self._elapsed_agreed
            if stops and not done:
                return "interrupted"

    def _train_step(self) -> tuple[Tensor, Tensor, Tensor]:
        """One update. Returns losses (T,), weights (T,) and whether all was finite, on the device."""
        train = self.config.train
        torch.manual_seed(seed_of(train.seed, "dropout", self.step, self._processes.rank))
        intensity, number = self._batches.take(self.step)
        if self.distiller is not None and self.step % self.steps_per_epoch == 0:
            self.distiller.new_epoch()
        result = self._update(self._moved(intensity), self._labels(number), self._advance)
        # The first averages must not cling to the initial weights.
        decay = min(train.ema_decay, self.step / (self.step + 9.0))
        with torch.no_grad():  # or the averages would keep every step's graph
            torch._foreach_lerp_(list(self.averaged.parameters()), list(self.model.parameters()), 1.0 - decay)
        return result.losses, result.weights, result.finite

    def _advance(self) -> float:
        """Averages gradients over processes, counts the step, and returns its learning rate."""
        self._elapsed_agreed, self._stop_agreed = self._processes.average_gradients(
            self._parameters, self._clock(), self._stop_requested
        )
        self.step += 1
        self.fraction = self._fraction_done(self._elapsed_agreed)
        return self._learning_rate()

    def _validate(self) -> None:
        metrics = self._measure(self._validation_logits())
        leading = self.model.tasks[0]  # space groups, where the model has them
        better = not self.best or metrics["top1"][leading] > self.best["top1"][leading]
        self.worse_validations = 0 if better else self.worse_validations + 1
        if better:
            self.best = metrics
            self._save_model(metrics, {})
        self._write("validation", best=better, metrics=metrics)

    def _measure(self, logits: dict[str, Tensor]) -> dict[str, Any]:
        """Top-1 share and cross-entropy of each task."""
        index = self.store.space_group_01[self.validation].long() - 1
        top1: dict[str, float] = {}
        loss: dict[str, float | None] = {}
        for task, rows in logits.items():
            labels = self._class_index[task][index]
            right = (rows.argmax(dim=1) == labels) & rows.isfinite().all(
                dim=1
            )  # argmax takes NaN for an answer
            top1[task] = float(right.double().mean())
            mean = float(F.cross_entropy(rows, labels))
            loss[task] = mean if math.isfinite(mean) else None  # JSON has no NaN
        return {"step": self.step, "top1": top1, "loss": loss}

    def _finish_model(self) -> dict[str, Any]:
        """Takes the best model up again and writes it with calibration and all metrics, which it returns."""
        self._processes.wait()  # until the first process has written it
        path = self.out_dir / checkpoint.MODEL_FILE
        self.averaged.load_state_dict(checkpoint.load_model(path, self.device).state_dict())
        logits = self._averaged_logits()
        if not all(bool(rows.isfinite().all()) for rows in logits.values()):
            raise InputError(
                f"{self.out_dir}: train.learning_rate: must be lower for this run: it diverged, "
                "and its best model gives NaN or infinity on validation patterns"
            )
        number = self.store.space_group_01[self.validation].long()
        calibration = fit_calibration(logits, number)
        metrics = self.best | evaluate_predictions(logits, number)
        if self.config.augment.profile != "sticks" and self._processes.rank == 0:
            calibration = dataclasses.replace(calibration, several_phases=self._fit_phases(calibration))
        self._save_model(metrics, calibration.to_dict())
        return metrics

    def _fit_phases(self, calibration: Calibration) -> tuple[float, ...]:
        """What tells scans of two phases from those of one, on structures of the training."""
        generator = torch.Generator().manual_seed(seed_of(self.config.train.seed, "phases", 0, 0))
        rows = self.training[torch.randperm(len(self.training), generator=generator)[:_PHASE_PATTERNS]]
        features: tuple[list[Tensor], list[Tensor]] = ([], [])
        for scans in draw_one_and_two(self.store, rows, self.config.augment, self.source.grid, generator):
            for found, intensity in zip(features, (scans.one, scans.two), strict=True):
                with torch.inference_mode(), self._autocast():
                    encoded = self.averaged.encode(self._moved(intensity))
                    logits = self.averaged.classify(encoded)._asdict()
                heads = {task: logits[task].float().cpu() for task in self.averaged.tasks}
                posterior = joint_posterior(heads, calibration)
                found.append(phase_features(encoded.float().cpu(), posterior, pattern_shape(intensity)))
        return fit_several_phases(*map(torch.cat, features))

    def _validation_logits(self) -> dict[str, Tensor]:
        """Logits of the validation patterns with today's averaged weights, as `_averaged_logits`."""
        with torch.no_grad():
            for averaged, current in zip(self.averaged.buffers(), self.model.buffers(), strict=True):
                averaged.copy_(current)
        if any(isinstance(module, _BatchNorm) for module in self.averaged.modules()):
            # Running statistics belong to the raw weights and follow the last few batches: take them anew.
            generator = torch.Generator().manual_seed(seed_of(self.config.train.seed, "recalibration", 0, 0))
            order = torch.randperm(len(self.training), generator=generator)
            sample = self.training[order[:_RECALIBRATION_PATTERNS]]
            recalibrate_batch_norm(self.averaged, self._fixed_batches(sample))
            self._write(
                "recalibration", patterns=len(sample), note="batch-norm statistics taken anew for validation"
            )
        return self._averaged_logits()

    def _averaged_logits(self) -> dict[str, Tensor]:
        """Logits of every task over the validation patterns, with averaged weights."""
        share = self._processes.share_of(self.validation)
        pieces = []
        with torch.inference_mode(), self._autocast():
            for intensity in self._fixed_batches(share):
                logits = self.averaged(intensity)._asdict()
                pieces.append(torch.cat([logits[task].float() for task in self.averaged.tasks], dim=1))
        joined = self._processes.join(torch.cat(pieces), len(self.validation)).cpu()
        widths = [N_CLASSES[task] for task in self.averaged.tasks]
        return dict(zip(self.averaged.tasks, joined.split(widths, dim=1), strict=True))

    def _fixed_batches(self, indices: Tensor) -> Iterator[Tensor]:
        for batch in indices.split(_EVALUATION_BATCH):
            yield self._moved(self.source.batch(batch)[0])

    def _labels(self, number: Tensor) -> dict[str, Tensor]:
        return {task: self._moved(table[number - 1]) for task, table in self._class_index.items()}

    def _moved(self, tensor: Tensor) -> Tensor:
        if tensor.device == self.device:
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _autocast(self) -> contextlib.AbstractContextManager:
        return autocast(self.device.type, self.config.train.precision == "bf16")

    def _fraction_done(self, elapsed: float) -> float:
        train = self.config.train
        by_steps = self.step / (train.epochs * self.steps_per_epoch) if train.epochs else 0.0
        by_time = elapsed / (60.0 * train.max_minutes) if train.max_minutes else 0.0
        return min(1.0, max(by_steps, by_time))

    def _learning_rate(self) -> float:
        return self.config.train.learning_rate * learning_rate_factor(self.fraction, self.config.train)

    def _clock(self) -> float:
        return time.monotonic() - self._begun

    def _write(self, event: str, **content: Any) -> None:
        if self._log is not None:
            place = {"step": self.step, "epoch": self.step / self.steps_per_epoch, "fraction": self.fraction}
            self._log.write({"event": event, **place, "elapsed": round(self._clock(), 3), **content})

    def _request_stop(self) -> None:
        self._stop_requested = True

    # --- files ---

    def save(self) -> None:
        """Writes the resumable state; called by all processes, written by the first.

        Raises:
            InputError: where the disk is full; the previous state is still there then.
        """
        self.elapsed = self._clock()
        memory = self.distiller.memory if self.distiller is not None else None
        if memory is not None:
            memory = self._processes.join(memory, len(memory) * self._processes.count)
        if self._processes.rank:
            return
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"averaged.{name}": tensor for name, tensor in self.averaged.state_dict().items()}
        tensors |= {f"balance.{name}": tensor for name, tensor in self.balance.state_dict().items()}
        if self.distiller is not None:
            tensors |= {f"distillation.{name}": x for name, x in self.distiller.state_dict().items()}
        if memory is not None:
            tensors["memory.dsr"] = memory
        for name, parameter in self._named_parameters:
            moments = self.optimizer.state.get(parameter, {})
            tensors |= {f"optimizer.{key}.{name}": tensor for key, tensor in moments.items()}
        state = {
            "config": self.config.to_dict(),
            "data": self._data_fingerprint(),
            "step": self.step,
            "elapsed": self.elapsed,
            "fraction": self.fraction,
            "best": self.best,
            "worse_validations": self.worse_validations,
        }
        checkpoint.save_state(self.out_dir / checkpoint.STATE_FILE, tensors, state)
        _return_freed_memory()

    def _open_folder(self, resume: bool) -> None:
        path = self.out_dir / checkpoint.STATE_FILE
        if resume and path.exists():
            self._restore(path)
            return
        if any((self.out_dir / name).exists() for name in (checkpoint.STATE_FILE, checkpoint.MODEL_FILE)):
            raise InputError(f"{self.out_dir}: folder: must be new or resumed, got a run")
        if self.config.model.weights:
            self._take_weights(model_path(self.config.model.weights))
        if self._processes.rank == 0:
            try:
                self.out_dir.mkdir(parents=True, exist_ok=True)
                (self.out_dir / CONFIG_FILE).write_text(self.config.to_toml(), encoding="utf-8")
            except OSError as error:
                raise InputError(
                    f"{self.out_dir}: folder: must be writable, got {error.strerror or error}"
                ) from error

    def _take_weights(self, source: Path) -> None:
        """Starts from the weights of a model of this preset and these validation folds."""
        preset = checkpoint.load_model_card(source).preset
        if preset != self.config.model.preset:
            raise InputError(
                f"{source}: preset: must be {self.config.model.preset} to start from, got {preset}"
            )
        data = self.config.data
        checkpoint.check_folds(source, data.folds_validation, data.stores, "this run's")
        weights = checkpoint.load_model(source, self.device).state_dict()
        for model in (self.model, self.averaged):
            model.load_state_dict(weights)

    def _restore(self, path: Path) -> None:
        tensors, state = checkpoint.load_state(path)
        kinds = ("model", "averaged", "balance", "optimizer", "distillation", "memory")
        parts: dict[str, dict[str, Tensor]] = {kind: {} for kind in kinds}
        try:
            for name, tensor in tensors.items():
                part, _, rest = name.partition(".")
                parts[part][rest] = tensor
            self._check_same_run(path, state["config"], state["data"])
            checkpoint.load_weights(path, self.model, parts["model"])
            checkpoint.load_weights(path, self.averaged, parts["averaged"])
            self.balance.load_state_dict(parts["balance"])
            if self.distiller is not None:
                self.distiller.load_state_dict(parts["distillation"])
            if "dsr" in parts["memory"]:
                share = parts["memory"]["dsr"].chunk(self._processes.count)[self._processes.rank]
                self.distiller.memory = share.to(self.device)
            for name, parameter in self._named_parameters:
                moments = {
                    key: parts["optimizer"].get(f"{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")
                }
                if moments["step"] is not None:
                    # The fused kernel takes parameter and moments as they lie, so both must lie alike.
                    self.optimizer.state[parameter] = {
                        key: torch.empty_like(parameter if x.dim() else x, device=self.device).copy_(x)
                        for key, x in moments.items()
                    }
            self.step, self.elapsed, self.fraction = (
                int(state["step"]),
                float(state["elapsed"]),
                float(state["fraction"]),
            )
            self.best, self.worse_validations = dict(state["best"]), int(state["worse_validations"])
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path}: state: must be that of a run, got {type(error).__name__} {error}"
            ) from error

    def _check_same_run(self, path: Path, config: dict[str, Any], data: dict[str, Any]) -> None:
        own, before = self.config.to_dict(), RunConfig(data=self.config.data).to_dict()
        for table, settings in own.items():
            for key, value in settings.items():
                saved = config.get(table, {}).get(key, before[table][key])  # a setting younger than the run
                if saved != value and f"{table}.{key}" not in _FREE_ON_RESUME:
                    raise InputError(
                        f"{path}: {table}.{key}: must be {saved} to resume this run, got {value}"
                    )
        if data != self._data_fingerprint():
            raise InputError(
                f"{path}: data: must be the stores this run began with, got {self._data_fingerprint()}"
            )

    def _data_fingerprint(self) -> dict[str, int]:
        rows = torch.cat([self.training, self.validation]).tolist()
        names = "\n".join(self.store.ids[row] for row in rows)
        return {
            "training": len(self.training),
            "validation": len(self.validation),
            "crc32": zlib.crc32(names.encode()),
        }

    def _save_model(self, metrics: dict[str, Any], calibration: dict[str, Any]) -> None:
        if self._processes.rank:
            return
        card = checkpoint.ModelCard(
            preset=self.config.model.preset,
            wavelength=self.store.simulation.wavelength,
            grid=dataclasses.asdict(self.source.grid),
            config=self.config.to_dict(),
            calibration=calibration,
            metrics=metrics,
        )
        checkpoint.save_model(self.out_dir / checkpoint.MODEL_FILE, self.averaged, card)

    def _check_sizes(self) -> None:
        size, processes = self.config.train.batch_size, self._processes.count
        if size % processes:
            raise InputError(f"train.batch_size: must be a multiple of {processes} processes, got {size}")
        preset = PRESETS[self.config.model.preset]
        hindrances = {
            "there is no GPU": self.device.type != "cuda",
            f"{preset.name} waits for the device": not preset.graphable,
            "there are several processes": processes > 1,
            "distillation is on": self.config.distillation.active,
        }
        for reason, is_one in hindrances.items():
            if is_one and self.config.train.cuda_graph:
                raise InputError(f"train.cuda_graph: must be false where {reason}, got true")
        if len(self.training) == 0:
            folds = list(self.config.data.folds_validation)
            raise InputError(
                f"data.folds_validation: must leave patterns to train on, got none beside {folds}"
            )
        if size > len(self.training):
            raise InputError(
                f"train.batch_size: must be <= {len(self.training)} training patterns, got {size}"
            )
        if len(self.validation) == 0:
            folds = list(self.config.data.folds_validation)
            raise InputError(f"data.folds_validation: must hold patterns of the stores, got none in {folds}")


def _return_freed_memory() -> None:
    """Gives what is free in the C library's heap back to the system; ragged batches break it up, and it would grow."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def learning_rate_factor(fraction: float, config: TrainConfig) -> float:
    """Share of the learning rate when `fraction` (0..1) of the run is done: a rise, then the fall.

    Example:
        >>> learning_rate_factor(1.0, TrainConfig(schedule="linear", final_fraction=0.1))
        0.1
    """
    if fraction < config.warmup_fraction:
        return fraction / config.warmup_fraction
    passed = (fraction - config.warmup_fraction) / (1.0 - config.warmup_fraction)
    high = {"cosine": 0.5 * (1.0 + math.cos(math.pi * passed)), "linear": 1.0 - passed, "constant": 1.0}
    return config.final_fraction + (1.0 - config.final_fraction) * high[config.schedule]


def recalibrate_batch_norm(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replaces the running statistics of every batch norm by plain averages over some batches.

    Args:
        model: in evaluation mode, and left so; its other layers (dropout) stay in that mode throughout.
        batches: of inputs.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's way to ask for the plain average
        norm.train()
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
