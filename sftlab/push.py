"""An export onto the Hub, by huggingface_hub's own client, which says what stands in the way.

Nothing is uploaded unless `--push OWNER/NAME` asks for it. A repository that is made is private unless `--public`.

    sftlab export runs/first --push OWNER/NAME
"""

from pathlib import Path

from sftlab import hub
from sftlab.config import ExportConfig
from sftlab.options import UserError

TOKEN = "Make a token with the role `write` at huggingface.co/settings/tokens, and store it with `sftlab token`."


def check_push(config: ExportConfig) -> None:
    """Raises UserError without a network or a token that the Hub knows, and where the repository is in use or not as asked for."""
    from huggingface_hub import HfApi, errors

    if not hub.reach():
        raise UserError("push: the Hub can't be reached. Connect, or leave --push out and upload the folder later.")
    api = HfApi()
    try:
        api.whoami()
        found = api.model_info(config.push)
    except errors.RepositoryNotFoundError:
        return
    except (errors.HfHubHTTPError, errors.LocalTokenNotFoundError) as error:
        raise UserError(f"push: {' '.join(str(error).split())[:200]} {TOKEN}") from error
    if bool(found.private) == config.public:
        state, flag = (
            ("private", "leave --public out") if found.private else ("public", "add --public if that is meant")
        )
        raise UserError(f"push: {config.push} exists and is {state}. Name another, or {flag}.")
    if not config.overwrite and (
        held := [file.rfilename for file in found.siblings or () if file.rfilename != ".gitattributes"]
    ):
        raise UserError(
            f"push: {config.push} holds {len(held)} files. Add --overwrite to replace those of the same names."
        )


def push_folder(folder: Path, config: ExportConfig) -> str:
    """Make the repository if there is none, upload the folder in one commit, and return its address."""
    from huggingface_hub import HfApi, errors

    api = HfApi()
    try:
        address = api.create_repo(config.push, private=not config.public, exist_ok=True)
        api.upload_folder(repo_id=config.push, folder_path=folder, commit_message="Export of SFT Lab")
    except (errors.HfHubHTTPError, OSError, RuntimeError, ValueError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        why = f"the Hub answered {status}" if status else " ".join(str(error).split())[:200]
        raise UserError(f"push: {why}; {folder} is whole and stays. Try again with "
                        f"`hf upload {config.push} {folder} .{'' if config.public else ' --private'}`.") from error  # fmt: skip
    print(f"pushed to {address} ({'public' if config.public else 'private'})")
    return str(address)
