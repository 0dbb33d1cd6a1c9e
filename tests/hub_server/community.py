"""What people do around repositories: discussions and pull requests, gates, collections."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .access import known_user_of, repo_of, user_of
from .repos import Discussion, HubError, Repo, timestamp


def summary(repo: Repo, discussion: Discussion) -> dict[str, object]:
    return {"num": discussion.num, "title": discussion.title, "status": discussion.status,
            "author": {"name": discussion.author}, "createdAt": discussion.created,
            "isPullRequest": discussion.is_pull_request, "repo": {"name": repo.id, "type": repo.type}}  # fmt: skip


def discussion_of(request: Request, repo: Repo) -> Discussion:
    found = [d for d in repo.discussions if d.num == request.path_params["num"]]
    if not found:
        raise HubError(404, "Discussion not found")
    return found[0]


async def list_discussions(request: Request) -> Response:
    repo, query = repo_of(request), request.query_params
    kinds = {"discussion": [False], "pull_request": [True]}.get(query.get("type", "all"), [False, True])
    status = {"open": ["open", "draft"], "closed": ["closed", "merged"]}.get(query.get("status", "all"))
    found = [summary(repo, d) for d in reversed(repo.discussions)
             if d.is_pull_request in kinds and query.get("author") in (None, d.author)
             and (status is None or d.status in status)]  # fmt: skip
    return JSONResponse({"discussions": found, "count": len(found), "start": 0})


async def create_discussion(request: Request) -> Response:
    repo, user, body = repo_of(request, "contribute"), known_user_of(request), await request.json()
    discussion = repo.discuss(body["title"], user, body["pullRequest"], body["description"])
    if discussion.is_pull_request:
        discussion.status = "draft"
        repo.git.references.create(f"refs/pr/{discussion.num}", repo.resolve("main").id)
    return JSONResponse({"num": discussion.num})


async def discussion_details(request: Request) -> Response:
    repo = repo_of(request)
    discussion = discussion_of(request, repo)
    details = summary(repo, discussion) | {"events": discussion.events}
    if discussion.is_pull_request:
        details["changes"] = {"base": discussion.base, "mergeCommitId": discussion.merge_commit}
        details |= {"filesWithConflicts": repo.conflicts(discussion), "diff": repo.diff(discussion)}
    return JSONResponse(details)


async def change_discussion(request: Request) -> Response:
    """A comment (by anybody), a new title or status (by its author or a member), a merge (by a member)."""
    action, user = request.path_params["action"], known_user_of(request)
    body = await request.json() if await request.body() else None
    body, repo = body or {}, repo_of(request)
    discussion = discussion_of(request, repo)
    if action == "comment":
        return JSONResponse({"newMessage": discussion.add_comment(user, body["comment"])})
    if not repo.is_member(user) and (action == "merge" or user != discussion.author):
        raise HubError(403, "You don't have write access to this repository")
    if action == "title":
        event = discussion.add_event("title-change", user, **{"from": discussion.title, "to": body["title"]})
        discussion.title = body["title"]
        return JSONResponse({"newTitle": event})
    if action == "merge":
        if discussion.status != "open" or not discussion.is_pull_request:
            raise HubError(409, f"This is {discussion.status}: only an open pull request can be merged")
        discussion.merge_commit = repo.merge(discussion, user)
    if body.get("comment"):
        discussion.add_comment(user, body["comment"])
    discussion.status = "merged" if action == "merge" else body["status"]
    return JSONResponse({"newStatus": discussion.add_event("status-change", user, status=discussion.status)})


async def settings(request: Request) -> Response:
    repo, body = repo_of(request, "write"), await request.json()
    repo.gated = body.get("gated", repo.gated)
    repo.private = body.get("visibility", "private" if repo.private else "public") == "private"
    return JSONResponse({})


async def grant(request: Request) -> Response:
    repo_of(request, "write").granted.add((await request.json())["user"])
    return JSONResponse({})


async def auth_check(request: Request) -> Response:
    repo_of(request, "files")
    return JSONResponse({})


async def create_collection(request: Request) -> Response:
    body, user, hub = await request.json(), known_user_of(request), request.app.state.hub
    slug = f"{body['namespace']}/{body['title'].lower().replace(' ', '-')}-{len(hub.collections):024x}"
    if body["namespace"] not in (user, *hub.organisations[user]):
        raise HubError(403, "You don't have the rights to create a collection here")
    same = [c for c in hub.collections.values() if (c["owner"], c["title"]) == (body["namespace"], body["title"])]
    if same:
        return JSONResponse({"error": "It exists already", "slug": same[0]["slug"]}, 409)
    hub.collections[slug] = {"slug": slug, "title": body["title"], "owner": body["namespace"], "items": [],
                             "lastUpdated": timestamp(), "position": 0, "private": bool(body.get("private")),
                             "theme": "blue", "upvotes": 0, "description": body.get("description")}  # fmt: skip
    return JSONResponse(hub.collections[slug])


async def collection(request: Request) -> Response:
    """Shows a collection, or adds an item to it."""
    user, hub = user_of(request), request.app.state.hub
    found = hub.collections.get("{ns}/{slug}".format(**request.path_params))
    if found is None or (found["private"] and user != found["owner"]):
        raise HubError(404, "Collection not found")
    if request.method == "POST":
        item, note = (body := await request.json())["item"], body.get("note")
        if user is None or found["owner"] not in (user, *hub.organisations[user]):
            raise HubError(403, "You don't have the rights to add to this collection")
        if any(known["id"] == item["id"] and known["type"] == item["type"] for known in found["items"]):
            raise HubError(409, "The item is there already")
        item |= {"_id": f"{len(found['items']):024x}", "position": len(found["items"])}
        found["items"].append(item | ({"note": {"text": note}} if note else {}))
    return JSONResponse(found)
