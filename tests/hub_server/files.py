"""Bytes in and out: preupload, commits, LFS, downloads and the xet tokens.

Every handler runs on the one event loop and holds it while it works on git, so a commit needs no lock to be atomic.
"""

import base64
import hashlib
import json
from typing import Any
from urllib.parse import unquote

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response

from .access import known_user_of, repo_of, revision_of, writable_repo
from .repos import LFS_SUFFIXES, LFS_THRESHOLD, Hub, HubError, lfs_pointer, read_card


async def preupload(request: Request) -> Response:
    """Regular or LFS for each file, and the id of what is there already, by which the client spots a no-op."""
    repo, files = writable_repo(request), []
    commit = repo.resolve(revision_of(request))
    for file in (await request.json())["files"]:
        is_binary = b"\0" in base64.b64decode(file["sample"])
        is_lfs = is_binary or file["path"].endswith(LFS_SUFFIXES) or file["size"] > LFS_THRESHOLD
        known = repo.entry(commit, file["path"]) if file["path"] in commit.tree else None
        files.append({"path": file["path"], "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False,
                      "oid": known and (known.sha256 or known.oid)})  # fmt: skip
    return JSONResponse({"files": files})


def parse_commit(hub: Hub, body: bytes) -> tuple[dict[str, Any], list[tuple[str, bytes | None]]]:
    """The header and the changes of a commit's ndjson."""
    lines = [json.loads(line) for line in body.splitlines() if line.strip()]
    changes: list[tuple[str, bytes | None]] = []
    for key, value in ((line["key"], line["value"]) for line in lines if line["key"] != "header"):
        path, content = value["path"], None
        if path.startswith("/") or {"..", ".", ".git"} & set(path.split("/")):
            raise HubError(400, f"Invalid path: {path}")
        if key == "file":
            content = base64.b64decode(value["content"])
            errors = read_card(content.decode(errors="replace"))[1] if path == "README.md" else []
            if errors:
                raise HubError(400, f"Invalid metadata in README.md: {'; '.join(errors)}")
        elif key == "lfsFile":
            if not hub.has_lfs(value["oid"]):
                raise HubError(400, f"The content of {path} was never uploaded")
            size = value.get("size") or hub.lfs_path(value["oid"]).stat().st_size
            content = lfs_pointer(value["oid"], size)
        changes.append((path.rstrip("/") + "/" if key == "deletedFolder" else path, content))
    return next(line["value"] for line in lines if line["key"] == "header"), changes


async def commit(request: Request) -> Response:
    body, hub = await request.body(), request.app.state.hub
    repo, user, revision = writable_repo(request), known_user_of(request), revision_of(request)
    header, changes = parse_commit(hub, body)
    tip = repo.resolve(revision)
    expected = header.get("parentCommit") or str(tip.id)
    message = "\n\n".join(part for part in (header["summary"], header.get("description")) if part)
    if "create_pr" in request.query_params:
        oid = repo.commit(None, repo.resolve(expected), changes, user, message)
        opened = repo.discuss(header["summary"], user, True, header.get("description") or "")
        opened.base, ref = f"refs/heads/{revision}", f"refs/pr/{opened.num}"
        repo.git.references.create(ref, oid)
    elif str(tip.id) != expected:
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    else:
        ref = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
        oid = repo.commit(ref, tip, changes, user, message)
    pull = next((d for d in repo.discussions if ref == f"refs/pr/{d.num}"), None)
    url = f"{hub.endpoint}/{'datasets/' if repo.type == 'dataset' else ''}{repo.id}"
    if pull is not None:
        pull.add_event("commit", user, subject=header["summary"], oid=oid)
    return JSONResponse({"commitOid": oid, "commitUrl": f"{url}/commit/{oid}", "success": True,
                         "pullRequestUrl": f"{url}/discussions/{pull.num}" if pull else None})  # fmt: skip


async def lfs_batch(request: Request) -> Response:
    repo, hub = repo_of(request, "contribute"), request.app.state.hub
    verify = f"{hub.endpoint}{request.url.path.removesuffix('batch')}verify"
    objects = []
    for wanted in (await request.json())["objects"]:
        actions = {"upload": {"href": f"{hub.cdn}/lfs/{wanted['oid']}"}, "verify": {"href": verify}}
        objects.append(wanted if hub.has_lfs(wanted["oid"]) else wanted | {"actions": actions})
    return JSONResponse({"transfer": "basic", "objects": objects, "repo": repo.id})


async def lfs_verify(request: Request) -> Response:
    repo_of(request, "contribute")
    wanted = await request.json()
    path = request.app.state.hub.root / "lfs" / wanted["oid"]
    if not path.exists() or path.stat().st_size != wanted["size"]:
        raise HubError(404, "The object was not uploaded")
    return JSONResponse({})


async def cdn(request: Request) -> Response:
    """The storage host: a second port, so that clients see a redirect that leaves the Hub."""
    hub, oid = request.app.state.hub, request.path_params["oid"]
    if request.method != "PUT":
        return FileResponse(hub.lfs_path(oid), headers={"ETag": f'"{oid}"'})
    part, digest = hub.new_folder().with_suffix(".part"), hashlib.sha256()
    with part.open("wb") as file:
        async for chunk in request.stream():
            digest.update(chunk)
            file.write(chunk)
    if digest.hexdigest() != oid:
        raise HubError(400, "The content does not match its hash")
    part.rename(hub.root / "lfs" / oid)
    return JSONResponse({})


async def resolve(request: Request) -> Response:
    repo, hub = repo_of(request, "files"), request.app.state.hub
    head = repo.resolve(revision_of(request))
    entry = repo.entry(head, unquote(request.path_params["path"]))
    headers = {"X-Repo-Commit": str(head.id), "ETag": f'"{entry.sha256 or entry.oid}"'}
    if entry.sha256 is None:
        return FileResponse(hub.blob_path(repo, entry.oid), headers=headers)
    headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(entry.size)}
    if (xet := hub.cas.find(entry.sha256)) is not None:
        route = f"{hub.endpoint}/api/{repo.type}s/{repo.id}/xet-read-token/{head.id}"
        headers |= {"X-Xet-Hash": xet[0], "Link": f'<{route}>; rel="xet-auth"'}
    return RedirectResponse(f"{hub.cdn}/lfs/{entry.sha256}", 302, headers)


async def xet_token(request: Request) -> Response:
    may_read_only = request.path_params["access"] == "read" or "create_pr" in request.query_params
    repo_of(request, "files" if may_read_only else "contribute")
    token = request.app.state.hub.cas.token()  # hf_xet reads the body, huggingface_hub the headers
    names = {"casUrl": "X-Xet-Cas-Url", "accessToken": "X-Xet-Access-Token", "exp": "X-Xet-Token-Expiration"}
    return JSONResponse(token, headers={names[key]: str(value) for key, value in token.items()})
