"""What a bundle's configuration may name: the allow-lists of ``check_configs``.

Nothing here runs code that a configuration brings, whatever its arguments. So entries are whole names, and not
prefixes: MONAI finds ``monai.data.utils.os.system`` as readily as ``monai.data.Dataset``; ``monai.utils`` has what
calls anything by its name, ``monai.transforms.LoadImage`` can be told to unpickle, and
``monai.losses.PerceptualLoss`` runs code of torch.hub. A configuration that needs more needs a line here, which is
reviewed as code is.
"""

from __future__ import annotations

import re

_TARGETS = {
    "ignite.handlers": "Checkpoint EarlyStopping",
    "ignite.metrics": "Accuracy Average Loss",
    "monai.data": "DataLoader Dataset DistributedSampler",
    "monai.engines": "PrepareBatchDefault PrepareBatchExtraInput SupervisedEvaluator SupervisedTrainer",
    "monai.handlers": "AveragePrecision CheckpointLoader LrScheduleHandler MLFlowHandler ROCAUC StatsHandler "
    "ValidationHandler",
    "monai.inferers": "SimpleInferer",
    "monai.transforms": "Activationsd AsDiscreted Compose Identityd Lambdad RandGaussianNoised",
    "torch.nn.parallel": "DistributedDataParallel",
    "s4mil_monai.embedding": "EmbeddingRun",
    "s4mil_monai.embedding_engine": "EncoderNetwork FeatureFiles SlidePatches build_network",
    "s4mil_monai.features.encoder": "load_encoder",
    "s4mil_monai.models.bag_model": "SlideLogits",
    "s4mil_monai.models.clam": "ClamMB ClamSB",
    "s4mil_monai.models.pooled": "PooledModel",
    "s4mil_monai.models.s4mil": "S4MIL",
    "s4mil_monai.models.sequence": "LSTMModel TransformerModel",
    "s4mil_monai.models.torchscript": "ExportableSlideLogits",
    "s4mil_monai.models.transmil": "TransMIL",
    "s4mil_monai.result": "PatchSettings",
    "s4mil_monai.streaming.network": "StreamedSlideLogits",
    "s4mil_monai.training.augment": "FillPatchLabels RandPatchDropoutd",
    "s4mil_monai.training.bags": "load_feature_bags",
    "s4mil_monai.training.composed": "BagRecipe compose_split",
    "s4mil_monai.training.engines": "DurableFiles EpochHistory EpochSeed Resume run_objects",
    "s4mil_monai.training.feature_files": "LoadFeaturesd",
    "s4mil_monai.training.fitted": "train_forest train_logistic",
    "s4mil_monai.training.lookahead": "Lookahead",
    "s4mil_monai.training.objective": "ClamInTraining ClamObjective MultitaskInTraining MultitaskLoss "
    "MultitaskObjective SlideLoss",
    "s4mil_monai.training.predictions": "PatchMetrics PredictionTable",
    "s4mil_monai.training.run_folder": "open_run",
    "s4mil_monai.training.sampling": "build_sampler",
    "s4mil_monai.training.splits": "split_bags",
    "s4mil_monai.training.ucsb": "load_ucsb_breast",
}
TARGETS = frozenset(f"{module}.{name}" for module, names in _TARGETS.items() for name in names.split())
"""Classes and functions that ``_target_`` may name."""

_CLASS_OF_TORCH = re.compile(r"torch\.(nn|optim|optim\.lr_scheduler)\.[A-Z][A-Za-z0-9]*", re.ASCII)
"""Layers, optimizers and schedules; no class of these packages reads or writes files."""

IMPORTS = frozenset(
    (
        "import ignite.distributed as idist",
        "import logging",
        "import monai",
        "import os",
        "import s4mil_monai.training.engines as engines",
        "import s4mil_monai.training.objective as objective",
        "import torch",
        "import torch.distributed as dist",
        "from ignite.engine import Events",
        "from pathlib import Path",
        "from s4mil_monai.demo import find_demo_slides",
        "from s4mil_monai.slides.overrides import read_overrides",
        "from s4mil_monai.training.bags import as_items",
        "from s4mil_monai.training.feature_files import find_feature_items",
        "from s4mil_monai.training.optimizers import group_parameters",
        "from s4mil_monai.training.places import find_bundle",
        "from s4mil_monai.training.process_group import join_processes",
        "from s4mil_monai.training.process_group import leave_processes",
        "from s4mil_monai.training.sampling import weigh_classes",
        "from s4mil_monai.training.ucsb import find_ucsb_breast",
    )
)
"""Whole statements: a name means one thing in every configuration, whichever file imported it."""

_MODULE_VALUES = {
    "dist": "get_rank get_world_size",
    "engines": "CHECKPOINT choose_epoch_by current_epoch first_loss log_loss scores_and_classes",
    "Events": "STARTED COMPLETED EPOCH_STARTED EPOCH_COMPLETED ITERATION_STARTED ITERATION_COMPLETED",
    "idist": "barrier get_rank get_world_size",
    "logging": "getLogger DEBUG INFO WARNING ERROR",
    "monai": "handlers.from_engine utils.set_determinism",
    "objective": "slide_logits_of",
    "torch": "device cuda.is_available cuda.set_device",
}
_BUILTINS = {"float", "int", "len", "str", "tuple"}
_IMPORTED = {statement.split()[-1] for statement in IMPORTS if statement.startswith("from ")}
VALUES = frozenset(
    _BUILTINS
    | (_IMPORTED - {"Events"})
    | {f"{module}.{name}" for module, names in _MODULE_VALUES.items() for name in names.split()}
)
"""What an expression may name and call; a module by itself is none of it."""

ATTRIBUTES = frozenset(
    (
        *("artifacts", "classes", "folder", "in_features", "model", "name", "settings", "state_dict_user_keys"),
        *("test", "train", "train_items", "type", "validation", "validation_items"),
    )
)
"""What may be read of the objects of a configuration."""

METHODS = frozenset(("add_event_handler", "attach", "extend", "leave", "resolve", "run", "setLevel", "to"))
"""What may be called on them; of a ``Path`` only what writes nothing."""

ENVIRONMENT = frozenset({"LOCAL_RANK", "RANK", "WORLD_SIZE"})
"""Variables that may be read as ``os.environ['…']``."""

MODES = frozenset({"default", "callable"})
"""Of ``_mode_``; ``debug`` opens a debugger."""

KEYS = frozenset({"_target_", "_mode_", "_requires_", "_disabled_", "_desc_"})
"""Keys between underscores; ``_debug_`` opens a debugger."""


def is_target(name: object) -> bool:
    """Whether ``_target_`` may be this."""
    return isinstance(name, str) and (name in TARGETS or _CLASS_OF_TORCH.fullmatch(name) is not None)
