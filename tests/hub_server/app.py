"""The Hub's HTTP side, in the protocol that huggingface_hub 2.4 speaks: accounts, repositories, and all routes."""

import shutil
from typing import Any
from urllib.parse import parse_qs, unquote

import pygit2
import yaml
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from . import community, files, jobs
from .access import known_user_of, repo_of, revision_of, type_of, user_of
from .repos import Hub, HubError, Repo, as_list, read_card, timestamp


async def whoami(request: Request) -> Response:
    user = known_user_of(request)
    orgs = [{"name": org, "type": "org"} for org in request.app.state.hub.organisations[user]]
    return JSONResponse({"name": user, "type": "user", "orgs": orgs, "auth": {"type": "access_token"}})


async def create_repo(request: Request) -> Response:
    body, user, hub = await request.json(), known_user_of(request), request.app.state.hub
    repo_type, namespace = body.get("type", "model"), body.get("organization") or user
    repo_id = f"{namespace}/{body['name']}"
    url = f"{hub.endpoint}/{'datasets/' if repo_type == 'dataset' else ''}{repo_id}"
    if namespace not in (user, *hub.organisations[user]):
        raise HubError(403, f'You don\'t have the rights to create a {repo_type} under the namespace "{namespace}"')
    if (repo_type, repo_id) in hub.repos:
        return JSONResponse({"error": "You already created this repo", "url": url}, 409)
    repo = Repo(repo_type, repo_id, hub.new_folder(), private=body.get("visibility") == "private")
    hub.repos[repo_type, repo_id] = repo
    return JSONResponse({"url": url, "name": repo_id, "id": repo_id})


async def delete_repo(request: Request) -> Response:
    body = await request.json()
    user = known_user_of(request)
    key = (body.get("type", "model"), f"{body.get('organization') or user}/{body['name']}")
    repo = request.app.state.hub.repos.get(key)
    if repo is None or not repo.is_member(user):
        raise HubError(404, "Repository not found", "RepoNotFound")
    shutil.rmtree(request.app.state.hub.repos.pop(key).folder)
    return JSONResponse({})


async def validate_yaml(request: Request) -> Response:
    data, errors = read_card((await request.json())["content"])
    warnings = [] if data or errors else ["empty or missing yaml metadata in repo card"]
    found = {"errors": errors, "warnings": warnings}
    messages = {key: [{"message": text} for text in texts] for key, texts in found.items()}
    return JSONResponse(messages, 400 if errors else 200)


def eval_results(repo: Repo, commit: pygit2.Commit) -> list[dict[str, Any]]:
    """The entries of `.eval_results/*.yaml`; a file that cannot be read appears as its error, as on the Hub."""
    results: list[dict[str, Any]] = []
    for entry in repo.entries(commit, ".eval_results") if ".eval_results" in commit.tree else ():
        try:
            results += [{"data": dict(data)} for data in yaml.safe_load(repo.read(commit, entry.path) or b"")]
        except (yaml.YAMLError, TypeError, ValueError) as error:
            results.append({"filename": entry.path, "error": str(error)})
    return results


def describe(repo: Repo, commit: pygit2.Commit, with_blobs: bool = False) -> dict[str, Any]:
    """A repository as `model_info` and `dataset_info` read it."""
    card, _ = read_card((repo.read(commit, "README.md") or b"").decode(errors="replace"))
    relation = card.get("base_model_relation")
    tags = [*as_list(card.get("tags")), *([card["library_name"]] if "library_name" in card else [])]
    tags += [f"base_model:{infix}{base}" for base in as_list(card.get("base_model"))
             for infix in ("", *([f"{relation}:"] if relation else []))]  # fmt: skip
    tags += [f"dataset:{name}" for name in as_list(card.get("datasets"))]
    tags += [f"license:{name}" for name in as_list(card.get("license"))]
    siblings = []
    for entry in (entry for entry in repo.entries(commit) if not entry.is_folder):
        blob = {"size": entry.size, "blobId": entry.oid} if with_blobs else {}
        if with_blobs and entry.sha256:
            blob["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
        siblings.append({"rfilename": entry.path} | blob)
    return {"id": repo.id, "author": repo.namespace, "sha": str(commit.id), "private": repo.private,
            "tags": [str(tag) for tag in tags], "gated": repo.gated,
            "createdAt": repo.created, "lastModified": timestamp(commit.commit_time),
            "siblings": siblings, "evalResults": eval_results(repo, commit),
            "model-index": card.pop("model-index", None), "library_name": card.get("library_name"),
            "cardData": card}  # fmt: skip


async def repo_info(request: Request) -> Response:
    repo = repo_of(request)
    return JSONResponse(describe(repo, repo.resolve(revision_of(request)), "blobs" in request.query_params))


async def list_repos(request: Request) -> Response:
    user, query = user_of(request), request.query_params
    found = [describe(repo, repo.resolve("main")) for repo in request.app.state.hub.repos.values()
             if repo.type == type_of(request) and (repo.is_member(user) or not repo.private)
             and query.get("author") in (None, repo.namespace) and query.get("search", "") in repo.id]  # fmt: skip
    return JSONResponse([repo for repo in found if set(query.getlist("filter")) <= set(repo["tags"])])


async def tree(request: Request) -> Response:
    repo, path = repo_of(request), unquote(request.path_params.get("path", ""))
    recursive = request.query_params.get("recursive", "false").lower() in ("true", "1")
    entries = repo.entries(repo.resolve(revision_of(request)), path, recursive)
    return JSONResponse([entry.to_json() for entry in entries])


async def paths_info(request: Request) -> Response:
    repo, form = repo_of(request), parse_qs((await request.body()).decode())
    commit = repo.resolve(revision_of(request))
    paths = [path for path in form.get("paths", []) if path.rstrip("/") in commit.tree]
    return JSONResponse([repo.entry(commit, path).to_json() for path in paths])


async def refs(request: Request) -> Response:
    repo, prefixes = repo_of(request), {"branches": "refs/heads/", "tags": "refs/tags/", "pullRequests": "refs/pr/"}
    return JSONResponse({"converts": []} | {kind: repo.refs(prefix) for kind, prefix in prefixes.items()})


async def commits(request: Request) -> Response:
    repo, items = repo_of(request), []
    for commit in repo.git.walk(repo.resolve(revision_of(request)).id):
        title, _, message = commit.message.partition("\n")
        items.append({"id": str(commit.id), "title": title, "message": message.strip(),
                      "authors": [{"user": commit.author.name}], "date": timestamp(commit.commit_time)})  # fmt: skip
    return JSONResponse(items)


async def edit_ref(request: Request) -> Response:
    """Creates or deletes a branch or a tag."""
    repo, kind = repo_of(request, "write"), request.url.path.split("/")[-2]
    body = await request.json() if request.method == "POST" else {}
    name = f"refs/{'heads' if kind == 'branch' else 'tags'}/{body.get('tag', revision_of(request))}"
    known = repo.git.references.get(name)
    if request.method == "DELETE":
        if known is None or name == "refs/heads/main":
            raise HubError(404, f"Cannot delete {name}", "RevisionNotFound")
        known.delete()
    elif known is not None:
        raise HubError(409, f"Reference {name} already exists")
    else:
        start = body.get("startingPoint", "main") if kind == "branch" else revision_of(request)
        repo.git.references.create(name, repo.resolve(start).id)
    return JSONResponse({})


async def super_squash(request: Request) -> Response:
    repo, branch = repo_of(request, "write"), revision_of(request)
    tree_id = repo.resolve(branch).tree.id
    squashed = repo.write(None, [], tree_id, known_user_of(request), (await request.json())["message"])
    repo.git.references[f"refs/heads/{branch}"].set_target(squashed)
    return JSONResponse({})


async def failed(request: Request, error: HubError) -> Response:
    return JSONResponse({"error": error.message}, error.status, headers=error.headers)


def build_app(hub: Hub) -> Starlette:
    """The application; it expects the undecoded path in `scope["path"]`, as `FaultLayer` puts it there."""
    repo = "/api/{types}/{ns}/{name}"
    routes = [
        ("GET", "/api/whoami-v2", whoami),
        ("POST", "/api/repos/create", create_repo),
        ("DELETE", "/api/repos/delete", delete_repo),
        ("POST", "/api/validate-yaml", validate_yaml),
        ("POST", "/api/collections", community.create_collection),
        ("GET", "/api/collections/{ns}/{slug}", community.collection),
        ("POST", "/api/collections/{ns}/{slug}/items", community.collection),
        ("POST", "/api/jobs/{ns}", jobs.create),
        ("GET", "/api/jobs/{ns}", jobs.list_jobs),
        ("GET", "/api/jobs/{ns}/{job}", jobs.inspect),
        ("GET", "/api/jobs/{ns}/{job}/logs", jobs.logs),
        ("GET", "/api/models", list_repos),
        ("GET", "/api/datasets", list_repos),
        ("GET", repo, repo_info),
        ("GET", repo + "/revision/{rev}", repo_info),
        ("GET", repo + "/tree/{rev}", tree),
        ("GET", repo + "/tree/{rev}/{path:path}", tree),
        ("POST", repo + "/paths-info/{rev}", paths_info),
        ("GET", repo + "/refs", refs),
        ("GET", repo + "/commits/{rev}", commits),
        ("POST DELETE", repo + "/branch/{rev}", edit_ref),
        ("POST DELETE", repo + "/tag/{rev}", edit_ref),
        ("POST", repo + "/super-squash/{rev}", super_squash),
        ("POST", repo + "/preupload/{rev}", files.preupload),
        ("POST", repo + "/commit/{rev}", files.commit),
        ("GET", repo + "/xet-{access}-token/{rev:path}", files.xet_token),
        ("GET", repo + "/discussions", community.list_discussions),
        ("POST", repo + "/discussions", community.create_discussion),
        ("GET", repo + "/discussions/{num:int}", community.discussion_details),
        ("POST", repo + "/discussions/{num:int}/{action}", community.change_discussion),
        ("PUT", repo + "/settings", community.settings),
        ("POST", repo + "/user-access-request/grant", community.grant),
        ("GET", repo + "/auth-check", community.auth_check),
        ("GET PUT", "/lfs/{oid}", files.cdn),
    ]
    for prefix in ("", "/datasets"):
        routes += [
            ("GET", prefix + "/{ns}/{name}/resolve/{rev}/{path:path}", files.resolve),
            ("POST", prefix + "/{ns}/{name}.git/info/lfs/objects/batch", files.lfs_batch),
            ("POST", prefix + "/{ns}/{name}.git/info/lfs/objects/verify", files.lfs_verify),
        ]
    table = [Route(path, handler, methods=methods.split()) for methods, path, handler in routes]
    app = Starlette(routes=table, exception_handlers={HubError: failed})  # type: ignore[dict-item]
    app.state.hub = hub
    return app
