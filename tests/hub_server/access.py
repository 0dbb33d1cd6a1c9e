"""Who asks, for what, and whether they may."""

from typing import Literal
from urllib.parse import unquote

from starlette.requests import Request

from .repos import HubError, Repo

Need = Literal["read", "files", "contribute", "write"]


def user_of(request: Request) -> str | None:
    """The account behind the request's token, None for an anonymous one."""
    token = request.headers.get("authorization", "").removeprefix("Bearer ")
    users = {token: name for name, token in request.app.state.hub.tokens.items()}
    if token and token not in users:
        raise HubError(401, "Invalid credentials in Authorization header")
    return users.get(token)


def known_user_of(request: Request) -> str:
    if (user := user_of(request)) is None:
        raise HubError(401, "Invalid username or password.")
    return user


def type_of(request: Request) -> str:
    return "dataset" if request.url.path.startswith(("/api/datasets", "/datasets")) else "model"


def repo_of(request: Request, need: Need = "read") -> Repo:
    """The repository that the path names, if the user may do with it what is needed."""
    user, hub = user_of(request), request.app.state.hub
    repo = hub.repos.get((type_of(request), "{ns}/{name}".format(**request.path_params)))
    if repo is None or (repo.private and not repo.is_member(user)):
        raise HubError(401 if user is None else 404, "Repository not found", "RepoNotFound")
    if need != "read" and repo.gated and not repo.is_member(user) and user not in repo.granted:
        raise HubError(401 if user is None else 403, f"Access to {repo.id} is restricted", "GatedRepo")
    if need in ("contribute", "write"):
        known_user_of(request)
    if need == "write" and not repo.is_member(user):
        raise HubError(403, "You don't have write access to this repository")
    return repo


def revision_of(request: Request) -> str:
    return unquote(request.path_params.get("rev", "main"))


def writable_repo(request: Request) -> Repo:
    """The repository of a preupload or a commit: everybody may open a pull request and add to their own."""
    own = [f"refs/pr/{d.num}" for d in repo_of(request).discussions if d.author == user_of(request)]
    may_contribute = "create_pr" in request.query_params or revision_of(request) in own
    return repo_of(request, "contribute" if may_contribute else "write")
