"""From a run to a Hugging Face directory on this machine, or on the Hub when told to."""

import os
import shutil
import tempfile
import uuid
from contextlib import suppress
from pathlib import Path

from tpaw_ray.config import Config
from tpaw_ray.errors import ConfigError, RunError
from tpaw_ray.handing_on.card import write_card
from tpaw_ray.handing_on.choice import Choice, choose, open_run
from tpaw_ray.policy.directory import ADAPTER, ADAPTER_WEIGHTS
from tpaw_ray.runs.address import told
from tpaw_ray.runs.store import RunStore
from tpaw_ray.runs.summary import Summary
from tpaw_ray.wording import one_line, shorten


def hand_on(run: str, wanted: str, to: str, *, push: bool) -> tuple[Choice, str]:
    """Copy a checkpoint out of a run and write its card: into the folder `to`, or with `push` into the Hub's model `to`.

    Returns the choice, and where the model is now.

    Raises:
        ConfigError: for a checkpoint that cannot be meant, or a push without a token or to what is no name.
        RunError: when there is no such run or checkpoint, it is damaged, the folder is not empty, or the Hub refuses.
    """
    token = _token(to) if push else ""
    store, config = open_run(run)
    made = [number for number in range(config.iterations + 1) if store.is_committed(store.checkpoint(number))]
    choice = choose(wanted, Summary(config, store).rows(), made, config.evaluation.split)
    if not push:
        return choice, str(_write(store, config, choice, Path(os.path.expanduser(to)).absolute()))
    with tempfile.TemporaryDirectory() as beside:
        folder = Path(beside) / "model"
        with told(str(folder), "written"):
            _fill(store, config, choice, folder, called=to)
        return choice, _upload(folder, to, token, f"{config.run.name}, checkpoint {choice.checkpoint}")


def _write(store: RunStore, config: Config, choice: Choice, folder: Path) -> Path:
    """Fill a folder beside, then rename it: an export is there whole, or not at all."""
    beside = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.writing")
    try:
        with told(str(folder), "written"):
            if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
                raise RunError(f"--to: {folder} is there already and not an empty folder; choose another or remove it")
            folder.parent.mkdir(parents=True, exist_ok=True)
            _fill(store, config, choice, beside, called=folder.name)
            beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def _fill(store: RunStore, config: Config, choice: Choice, folder: Path, *, called: str) -> None:
    folder.mkdir()
    checkpoint = store.checkpoint(choice.checkpoint)
    store.fetch(checkpoint, folder)
    committed = store.checksums(checkpoint)
    for path in folder.rglob("*"):  # the run's own marker, and what nobody committed
        if path.is_file() and path.relative_to(folder).as_posix() not in committed:
            path.unlink()
    if config.base_of(choice.checkpoint) != choice.checkpoint:
        _merge(store, config, choice, folder)
    (folder / "README.md").unlink(missing_ok=True)  # of a start model that brought its own
    write_card(store, config, choice, called=called, path=folder / "README.md")


def _merge(store: RunStore, config: Config, choice: Choice, folder: Path) -> None:
    """Put the weights of adapter and start model together in place of the adapter's files."""
    from safetensors import SafetensorError

    from tpaw_ray.policy.adapter import load_adapter, merged_state
    from tpaw_ray.policy.model import load_model

    store.verify(store.checkpoint(0))
    model = load_model(
        store.on_disk(store.checkpoint(0)),
        precision=config.learner.precision,
        trust_remote_code=config.model.trust_remote_code,
    )
    load_adapter(model, folder)
    state = merged_state(model)
    for name in (ADAPTER, ADAPTER_WEIGHTS):
        (folder / name).unlink()
    try:
        model.save_pretrained(folder, state_dict=state)
    except SafetensorError as error:  # the system's own is inside
        raise OSError(str(error)) from error


def _token(name: str) -> str:
    """The token to push with, looked for before anything is done."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    with suppress(HFValidationError):
        validate_repo_id(name)
        if name.count("/") == 1:
            token = get_token()
            if token is None:
                raise ConfigError("--push: found no token; set HF_TOKEN to one that may write, or log in with hf auth login")
            return token
    raise ConfigError(f"--to: found {shorten(name)}, expected with --push the name of a model on the Hub, as in me/my-model")


def _upload(folder: Path, name: str, token: str, message: str) -> str:
    """Upload a folder as one commit into a model, which is made private where there is none yet. Returns its address."""
    from httpx import HTTPError
    from huggingface_hub import HfApi

    hub = HfApi(token=token)
    try:
        address = hub.create_repo(name, private=True, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
    except (HTTPError, OSError) as error:  # what the Hub answers is both
        raise RunError(f"--push: {name} cannot be pushed: {one_line(error)}") from error
    return str(address)
