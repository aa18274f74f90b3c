"""An export onto the Hub: everything that can stand in its way is looked at before the work begins.

Nothing is uploaded unless `--push OWNER/NAME` asks for it. A repository that is made is private unless `--public`.

    sftlab export runs/first --push OWNER/NAME
"""

from pathlib import Path

from sftlab import hub
from sftlab.config import ExportConfig
from sftlab.options import UserError

BY_ITSELF = {".gitattributes"}  # what the Hub puts into a new repository


def check_push(config: ExportConfig) -> None:
    """Raises UserError where the Hub can't be reached, the token is missing or may not write, or the repository is in use."""
    from huggingface_hub import HfApi, errors, get_token

    owner = config.push.split("/")[0]
    if not hub.reach():
        raise UserError("push: the Hub can't be reached. Connect, or leave --push out and upload the folder later.")
    if get_token() is None:
        raise UserError("push: there is no token. Make one with the role `write` at huggingface.co/settings/tokens, and set "
                        "HF_TOKEN to it, or store it with `sftlab token`.")  # fmt: skip
    api = HfApi()
    try:
        person = api.whoami()
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        why = "the Hub doesn't know the token" if status == 401 else f"the Hub answered {status}"
        raise UserError(f"push: {why}. Make one with the role `write` at huggingface.co/settings/tokens.") from error
    owners = {person["name"], *(group["name"] for group in person.get("orgs", ()))}
    if owner not in owners:
        raise UserError(
            f"push: the token is {person['name']}'s, who is not in {owner}. Write one of: {', '.join(sorted(owners))}."
        )
    if not may_write(person, config.push):
        raise UserError(f"push: the token may read but not write to {owner}. Make one with the role `write` at "
                        "huggingface.co/settings/tokens.")  # fmt: skip
    try:
        found = api.model_info(config.push)
    except errors.RepositoryNotFoundError:
        return
    except errors.HfHubHTTPError as error:
        raise hub.explain(config.push, "model", error) from error
    if not found.private and not config.public:
        raise UserError(f"push: {config.push} exists and is public. Add --public if that is meant, or name another.")
    if found.private and config.public:
        raise UserError(
            f"push: {config.push} exists and is private. Make it public on its page, or leave --public out."
        )
    held = {file.rfilename for file in found.siblings or ()} - BY_ITSELF
    if held and not config.overwrite:
        raise UserError(f"push: {config.push} holds {len(held)} files, {sorted(held)[0]} first. Add --overwrite to replace those of the "
                        "same names, or name another.")  # fmt: skip


def may_write(person: dict, repository: str) -> bool:
    """Whether whoami's answer gives its token the right to write to a repository, or to all of its owner's."""
    token = person.get("auth", {}).get("accessToken", {})
    if token.get("role") != "fineGrained":
        return token.get("role") in ("write", "admin")
    scopes = token.get("fineGrained", {}).get("scoped", ())
    return any(
        scope.get("entity", {}).get("name") in (repository, repository.split("/")[0])
        and "repo.write" in scope.get("permissions", ())
        for scope in scopes
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
