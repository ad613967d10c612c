"""The model card of an exported model: README.md as a hub of models reads it.

It says what is known and nothing else: settings and users from `run.yaml`, numbers from a `report.json`. What nobody
wrote down (whose recordings, with which consent, under which licence) it asks for.
"""

import json
import re
from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from .config import UserError, first_few
from .train_config import TrainConfig

MOST_BYTES = 20 << 20  # of a report
SCORES = {"user_accuracy": "user accuracy", "fd_user": "FD_user", "kid_user": "KID_user", "near_copies": "near copies"}
SCORES |= {name: name for name in ("precision", "recall", "density", "coverage", "nearest")}
FOLDERS = ".", "report", "validation"  # where a report.json lies in a folder of samples
PRIVATE = "resume_checkpoint", "val_dir"  # where files lay is nobody's business

CARD = """\
---
{front}
license: unknown  # yours to choose; then say so here
---

# {name}

{what}

## Use

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)  # runs pipeline.py of this folder
images = pipe({who}num_images=4, num_steps=50).images
images[0].save("first.png")
```

{how} `generator=torch.Generator().manual_seed(0)` gives the same images again.

## Data

- Users: {users}
- Images: {images}
- Image size: {image_size} x {image_size} pixels
- Simulated or measured people, which radar, with whose consent: not recorded; say it here

## Training

- Steps: {steps}
- Batch: {batch}
- Recipe, as flags of `image_train_vae.py`:

```yaml
{recipe}
```

## Measured

{measured}

## Intended use, and limits

For research on radar gait: more images of the users in the training data, to augment, balance or study them.

- It knows only the users, the radar and the settings of its training data, and says nothing of anybody else.
- If the data were simulated, so is all that it shows: a result on simulated people is none on real ones.
- Gait identifies. If the data were measured, the images can tell who walked, and a network can repeat what it was
  trained on: treat weights and images as personal data of the people who were recorded, publish them only with their
  consent, and let no person's name be a user's name.
- Not for identifying or following people, not for deceiving a system that knows people by their gait, not for anything
  medical, and not as evidence.
- Whether images are copies of training images is a question for `validate.py`, not for the eye.

## Where it comes from

Exported from `{weights}` by `export_model.py` of guided_diffusion_vae; its `import_model.py --pipeline FOLDER` makes a
run of it again.
"""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a card is made of."""

    name: str  # of the folder
    weights: str  # name of the file that was exported
    settings: dict  # of the run; {} without a run.yaml
    recipe: dict  # settings of network and process that are not the defaults
    network: str  # unet or dit
    process: str  # gaussian or flow
    class_names: list[str] | None  # the users
    images_per_user: dict[str, int]  # that it was trained on; {} if that was not recorded
    image_size: int
    latent: tuple[int, int, int]  # (C, h, w) of what the network sees
    parameters: int
    vae: bool  # whether an autoencoder decodes what the network makes
    guided: bool  # whether there is a null label
    measured: str  # from `measured`


def card(facts: Facts) -> str:
    """The text of README.md."""
    flow, dit, users = facts.process == "flow", facts.network == "dit", facts.class_names
    tags = ["diffusers", "radar", "micro-doppler", "spectrogram", "flow-matching" if flow else "guided-diffusion"]
    front = {"library_name": "diffusers", "pipeline_tag": "unconditional-image-generation", "tags": tags}
    counts = sorted(facts.images_per_user.values())
    each = f"{counts[0]} to {counts[-1]}" if counts and counts[0] < counts[-1] else f"{counts[0]}" if counts else ""
    batch = facts.settings.get("batch_size")
    return CARD.format(
        front=yaml.safe_dump(front, sort_keys=False).rstrip(),
        name=_plain(facts.name),
        what=_what(facts),
        who=f"users=[{json.dumps(_plain(users[0]))}], " if users else "",
        how=_how(dit, users, facts.guided),
        users=f"{len(users)}, {_plain(users[0])} to {_plain(users[-1])}" if users else "not told apart",
        images=f"{sum(counts)}, {each} of each user" if counts else "not recorded",
        image_size=facts.image_size,
        steps=_steps(facts.weights),
        batch=f"{batch} on each process" if batch else "not recorded",
        recipe=yaml.safe_dump(facts.recipe | _changed(facts.settings), sort_keys=False, allow_unicode=True).rstrip(),
        measured=facts.measured,
        weights=_plain(facts.weights),
    )


def _what(facts):
    network = "LightningDiT (a transformer)" if facts.network == "dit" else "ADM U-Net"
    process = "flow matching" if facts.process == "flow" else "Gaussian diffusion"
    c, h, w = facts.latent
    return (
        f"Radar micro-Doppler spectrograms of walking people, {facts.image_size} x {facts.image_size} pixels, of"
        f" {len(facts.class_names) if facts.class_names else 'no particular'} users. {network}, {facts.parameters:,}"
        f" weights, trained by {process} on {'latents' if facts.vae else 'pixels'} of {c} x {h} x {w}"
        f"{', which an autoencoder decodes' if facts.vae else ''}."
    )


def _how(dit, users, guided):
    needs = "Needs `diffusers` and `torch`, nothing else."
    if dit:
        needs = "Needs `diffusers` and, for its network, of which diffusers has no twin, `guided_diffusion_vae`."
    scale = "`guidance_scale` above 1 exaggerates what tells the users apart." if guided else "It cannot be guided."
    return f"{needs} {scale}" if users else needs


def _steps(weights):
    step = re.search(r"(\d{6,})\.pt$", weights)
    best = "those with the lowest validation loss" if weights.endswith("_best.pt") else "not recorded"
    return f"{int(step[1]):,}" if step else best


def _changed(settings):
    """The settings of the training that are not the defaults."""
    known = {field.name: field.default for field in fields(TrainConfig) if field.name not in PRIVATE}
    return {name: settings[name] for name in known if settings.get(name, known[name]) != known[name]}


# ---- what was measured -----------------------------------------------------------------------------------------------


def measured(report: str) -> str:
    """The numbers of a `report.json` of evaluate_samples.py or validate.py as a table, or "Not measured."

    Args:
        report: the file, a folder that holds it, or a folder of samples with `report` or `validation` in it; empty for
            none.
    Raises:
        UserError: there is none, or it is of something else.
    """
    if not report:
        return "Not measured."
    path = Path(report)
    if not path.is_dir():
        return _table_of(path)
    found = [path / name / "report.json" for name in FOLDERS if (path / name / "report.json").is_file()]
    if not found:
        raise UserError(f"--report {report} holds no report.json: give what evaluate_samples.py or validate.py made")
    return "\n\n".join(map(_table_of, found))


def _table_of(path: Path) -> str:
    report = read_json(path, "--report", most=MOST_BYTES)
    try:
        lines = _scores(report) if "rows" in report else _answers(report)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"--report {path} is no report of evaluate_samples.py or validate.py") from error
    return "\n".join(lines)


def _scores(report) -> list[str]:
    rows, about = report["rows"], report["about"]
    used = [name for name in SCORES if any(row.get(name) is not None for row in rows.values())]
    table = [["", *map(_plain, rows)]]
    table += [[SCORES[name], *(_number(row.get(name)) for row in rows.values())] for name in used]
    told = f"By evaluate_samples.py. Chance is {_number(about['chance'])}. Features: {_plain(about['feature_space'])}."
    return [*_markdown(table), "", told, *(f"Note: {_plain(note)}." for note in report.get("notes", []))]


def _answers(report) -> list[str]:
    first = report["sections"][0]
    tables = [[table["header"], *table["rows"]] for table in first["tables"]]
    if not tables:
        header = ["name", "value", "real", "worst"]
        tables = [[header, *([finding[name] for name in header] for finding in first["findings"])]]
    lines = [line for table in tables for line in [*_markdown([list(map(_number, row)) for row in table]), ""]]
    return [*lines, "By validate.py, each number beside that of real images and the worst."]


def _markdown(table: list[list[str]]) -> list[str]:
    head, *rows = (f"| {' | '.join(cells)} |" for cells in table)
    return [head, f"|{'---|' * len(table[0])}", *rows]


def _number(value) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else _plain(value)


def _plain(text) -> str:
    """One line of text that cannot be taken for markup."""
    return " ".join(re.sub(r"[|`<>\[\]\\\"]", "", str(text)).split())[:300]


def read_json(path, flag: str, *, most: int = 1 << 20) -> dict:
    """A JSON file that holds a mapping.

    Raises:
        UserError: it is missing, too large, or something else.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{flag} {path} does not exist")
    if path.stat().st_size > most:
        raise UserError(f"{flag} {path} is larger than {most >> 20} MB; that is not the file that is meant")
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{flag} {path} is not JSON ({' '.join(str(error).split())[:80]}); copy it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{flag} {path} holds a {type(found).__name__}, not a mapping; copy it again")
    return found


def names_in_short(names: list[str]) -> str:
    """The first few users, to be read before they are published."""
    return first_few([_plain(name) for name in names], 3)
