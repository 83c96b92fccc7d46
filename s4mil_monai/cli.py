"""The ``s4mil`` command: arguments in, one line out. The only module that prints.

Exit codes: 0 scored, 1 something was wrong with a slide, a model or a folder, 2 wrong use of the command,
3 a result without a score (no tissue).
"""

from __future__ import annotations

import difflib
import gc
import inspect
import logging
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from s4mil_monai import __version__
from s4mil_monai.errors import BundleError, S4MilError

EXIT_ERROR, EXIT_USAGE, EXIT_NO_SCORE = 1, 2, 3


class UsageError(S4MilError):
    """The command was called with something it does not take."""


def score(
    slide: str,
    *,
    out: str = "results",
    bundle: str | None = None,
    assume_mpp: float | None = None,
    encoder: str | None = None,
    encoder_weights: str | None = None,
    patch_stage: str = "torch",
    batch_size: int = 16,
    device: str = "auto",
) -> int:
    """Score one slide; write result.json, heatmap.png, regions.geojson, features.h5 and report.html.

    Args:
        slide: A slide file, or a folder with one DICOM slide.
        out: Folder that gets a folder named after the slide.
        bundle: Folder of the trained model; the shipped demonstration model by default.
        assume_mpp: Micrometres per pixel of the slide's finest level, for slides that do not say.
        encoder: Name of the patch encoder you expect the bundle to have.
        encoder_weights: Weights file of the encoder, instead of the published one.
        patch_stage: What prepares patches: torch or dali.
        batch_size: Patches the encoder takes at once.
        device: cpu, cuda, or auto.
    """
    from s4mil_monai.scoring import load_scorer, score_to_folder

    _require_positive("assume_mpp", assume_mpp)
    _require_positive("batch_size", batch_size)
    _require_slide(slide)
    scorer = load_scorer(
        bundle or _shipped_bundle(),
        encoder=encoder,
        encoder_weights=encoder_weights,
        patch_stage=_patch_stage(patch_stage),
        batch_size=batch_size,
        device=_device(device),
    )
    with _ProgressBar() as bar:
        result, folder = score_to_folder(slide, scorer, out, assume_mpp=assume_mpp, progress=bar.show)
    if result.status != "scored":
        _complain(f"{result.slide.name}: no score, {result.reason}; written to {folder}")
        return EXIT_NO_SCORE
    assert result.probabilities is not None
    assert result.patches is not None
    for note in result.slide.notes:
        print(f"{result.slide.name}: note: {note}")
    print(
        f"{result.slide.name}: {result.predicted}, probability {max(result.probabilities):.3f} "
        f"({len(result.patches.top_left_px0)} patches, {result.seconds['total']:.1f} s)"
    )
    print(f"open {folder / 'report.html'}")
    return 0


def embed(
    slide: str,
    *,
    out: str = "features",
    encoder: str = "efficientnet_lite0",
    encoder_weights: str | None = None,
    assume_mpp: float | None = None,
    mpp: float = 0.5,
    min_tissue: float = 0.5,
    scan_order: str = "row_major",
    patch_stage: str = "torch",
    batch_size: int = 16,
    device: str = "auto",
) -> int:
    """Embed one slide's patches; write OUT/<slide>.h5.

    Args:
        slide: A slide file, or a folder with one DICOM slide.
        out: Folder for the feature file.
        encoder: resnet50_block3 or efficientnet_lite0.
        encoder_weights: Weights file of the encoder, instead of the published one.
        assume_mpp: Micrometres per pixel of the slide's finest level, for slides that do not say.
        mpp: Micrometres per pixel of the patches.
        min_tissue: Least share of a patch that is tissue.
        scan_order: row_major or column_major.
        patch_stage: What prepares patches: torch or dali.
        batch_size: Patches the encoder takes at once.
        device: cpu, cuda, or auto.
    """
    from s4mil_monai.features.encoder import load_encoder
    from s4mil_monai.features.extract import extract_features
    from s4mil_monai.features.store import save_bag
    from s4mil_monai.result import PatchSettings
    from s4mil_monai.slides.reader import open_slide

    _require_positive("assume_mpp", assume_mpp)
    _require_positive("mpp", mpp)
    _require_positive("batch_size", batch_size)
    if not 0 <= min_tissue <= 1:
        raise UsageError(f"--min_tissue is a share between 0 and 1, got {min_tissue}")
    _require_slide(slide)
    settings = PatchSettings(mpp=mpp, min_tissue=min_tissue, scan_order=scan_order)
    ready = load_encoder(encoder, weights=encoder_weights, device=_device(device))
    with _ProgressBar() as bar, open_slide(slide, assume_mpp=assume_mpp) as opened:
        bag = extract_features(
            opened,
            ready,
            settings,
            patch_stage=_patch_stage(patch_stage),
            batch_size=batch_size,
            progress=bar.show,
        )
    path = Path(out) / f"{Path(slide).stem}.h5"
    save_bag(path, bag)
    print(f"{bag.origin.slide}: {len(bag)} patches of {bag.features.shape[1]} features in {path}")
    return 0


def import_checkpoint(checkpoint: str, *, out: str) -> int:
    """Read a checkpoint of the original authors' S4Model, CLAM_SB, CLAM_MB or TransMIL; write it for this package.

    Args:
        checkpoint: Their .pt, .pth or .safetensors file.
        out: A .safetensors file with our parameter names, kind and settings.
    """
    from s4mil_monai.models.checkpoints import import_checkpoint as read
    from s4mil_monai.models.checkpoints import save_imported

    if not out.endswith(".safetensors"):
        raise UsageError(f"--out is a .safetensors file, got {out}")
    imported = read(checkpoint)
    save_imported(imported, Path(out))
    described = ", ".join(f"{name} {value}" for name, value in imported.settings.items())
    print(f"{checkpoint}: {imported.kind} ({described}), written to {out}")
    return 0


def version() -> int:
    """Print the version."""
    print(__version__)
    return 0


COMMANDS: dict[str, Callable[..., int]] = {
    "score": score,
    "embed": embed,
    "import-checkpoint": import_checkpoint,
    "version": version,
}
"""Commands by name; their keyword arguments are the options."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it finds wrong comes back as our errors
    try:
        code = _run(arguments)
    except UsageError as error:
        _complain(str(error))
        code = EXIT_USAGE
    except S4MilError as error:
        _complain(str(error))
        code = EXIT_ERROR
    except KeyboardInterrupt:
        _complain("interrupted; nothing was written")
        code = 130
    gc.freeze()  # else Python walks all of torch once more before it leaves: half a second
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    if arguments == ["--version"]:
        arguments = ["version"]
    _check_usage(arguments)
    from fire import Fire
    from fire.decorators import SetParseFns

    from s4mil_monai.allocator import keep_large_buffers

    keep_large_buffers()
    codes: list[int] = []

    def keeping_code(command: Callable[..., int]) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            codes.append(command(*args, **kwargs))

        run.__signature__ = inspect.signature(command, eval_str=True)  # type: ignore[attr-defined]
        run.__doc__ = command.__doc__
        # fire guesses types: without this --slide=2024_001 arrives as the integer 2024001
        as_text = {name: str for name, kind in _option_types(command).items() if "str" in kind}
        return SetParseFns(**as_text)(run)

    Fire({name: keeping_code(command) for name, command in COMMANDS.items()}, command=arguments, name="s4mil")
    return codes[-1] if codes else 0


def _option_types(command: Callable[..., int]) -> dict[str, str]:
    return {name: str(parameter.annotation) for name, parameter in inspect.signature(command).parameters.items()}


def _check_usage(arguments: list[str]) -> None:
    """Refuse wrong use before anything runs; fire would run first and complain after, over many lines."""
    if not arguments or arguments[0].startswith("-"):
        return
    name = arguments[0]
    if name not in COMMANDS:
        raise UsageError(f"unknown command {name!r}; known: {', '.join(COMMANDS)}")
    parameters = inspect.signature(COMMANDS[name]).parameters
    options, positional = _split(arguments[1:])
    if "help" in options or "h" in options:
        return
    known = {option: key for option in options if (key := _full_name(option, parameters))}
    for option in options:
        if option not in known:
            close = difflib.get_close_matches(option, parameters, n=1)
            hint = f"did you mean --{close[0]}? " if close else ""
            listed = ", ".join(f"--{key}" for key in parameters)
            raise UsageError(f"unknown option --{option}; {hint}known: {listed}")
    wanted = [key for key, parameter in parameters.items() if parameter.kind is not parameter.KEYWORD_ONLY]
    missing = [key for key in wanted if key not in known.values()][len(positional) :]
    if missing:
        raise UsageError(f"{name} needs {missing[0].upper()}; see s4mil {name} --help")
    for key, parameter in parameters.items():
        if (
            parameter.kind is parameter.KEYWORD_ONLY
            and parameter.default is parameter.empty
            and key not in known.values()
        ):
            raise UsageError(f"{name} needs --{key}; see s4mil {name} --help")
    if len(positional) > len(wanted):
        raise UsageError(f"{name} takes {len(wanted)} argument(s), got also {positional[len(wanted)]!r}")


def _full_name(option: str, parameters: Iterable[str]) -> str | None:
    """The parameter an option names; one letter stands for the only one that begins with it, as fire has it."""
    if len(option) > 1:
        return option if option in parameters else None
    fitting = [key for key in parameters if key.startswith(option)]
    return fitting[0] if len(fitting) == 1 else None


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Option names and positional arguments; an option's value is the next argument unless it has ``=``."""
    options, positional = [], []
    waiting = iter(arguments)
    for argument in waiting:
        if argument.startswith("-") and not argument[1:2].isdigit():
            options.append(argument.lstrip("-").split("=")[0].replace("-", "_"))
            if "=" not in argument and options[-1] not in ("help", "h"):
                next(waiting, None)
        else:
            positional.append(argument)
    return options, positional


def _require_positive(name: str, value: float | None) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UsageError(f"--{name} is a positive number, got {value!r}")


def _require_slide(slide: str) -> None:
    """Refuse a missing slide before models are loaded."""
    if not Path(slide).exists():
        raise UsageError(f"{slide}: there is no such slide")


def _patch_stage(name: str) -> str:
    from s4mil_monai.features.patch_stage import choose_patch_batches

    choose_patch_batches(name)
    return name


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name} is not there ({str(error).splitlines()[0]})") from error
    return name


def _shipped_bundle() -> Path:
    """The demonstration bundle of a source checkout."""
    bundle = Path(__file__).resolve().parent.parent / "bundles" / "s4mil_slide"
    if not bundle.is_dir():
        raise BundleError(
            str(bundle), "bundles come with the source, not with the package; give one with --bundle"
        )
    return bundle


class _ProgressBar:
    """Patches done with rate and time left, on a terminal only."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __enter__(self) -> _ProgressBar:
        return self

    def show(self, done: int, total: int) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="patch", disable=not sys.stderr.isatty(), leave=False)
        self._bar.update(done - self._bar.n)

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _complain(text: str) -> None:
    print(f"s4mil: {' '.join(text.split())}", file=sys.stderr)


if __name__ == "__main__":
    main()
