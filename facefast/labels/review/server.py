"""The page's server: this machine only, behind a token in the address, and nothing but the pictures of one review."""

from __future__ import annotations

import contextlib
import dataclasses
import hmac
import importlib.resources
import json
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from werkzeug import Request, Response
from werkzeug.exceptions import BadRequest, Conflict, Forbidden, HTTPException, NotFound
from werkzeug.routing import Map, Rule
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server

from facefast.labels.review.decisions import Decisions, UnwritableName, read_back, shown, summary
from facefast.labels.review.items import Item, Review
from facefast.labels.review.portraits import VIEWS, Portraits
from facefast.runtime import files
from facefast.runtime.exits import StorageError
from facefast.runtime.terminal import complain, message, say

HERE = "127.0.0.1"
HOSTS = (HERE, "localhost")
"""What a browser on this machine, or at the other end of an SSH tunnel, may have asked for. Another name that leads
here is somebody's trick to have a page of theirs read ours (DNS rebinding)."""
LARGEST_BODY = 1 << 16
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; img-src 'self' data:; style-src 'self'; script-src 'self'; connect-src 'self'; "
        "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
FOREVER = "private, max-age=86400, immutable"
"""Pictures of a row never change while this token is valid: the browser fetches those of the next items ahead."""


class Application:
    """Answers requests about one review.

    Args:
        review: the questions.
        decisions: the answers.
        stop: called when the person says that this is all.
    """

    def __init__(self, review: Review, decisions: Decisions, stop: Callable[[], None]) -> None:
        self.review, self.decisions, self.stop = review, decisions, stop
        self.token = secrets.token_urlsafe(24)
        self.portraits = Portraits(review.index)
        self._lock = threading.Lock()
        page = importlib.resources.files("facefast.labels.review") / "page"
        names = {"": "index.html", "review.css": "review.css", "review.js": "review.js"}
        self._files = {
            name: ((page / file).read_bytes(), TYPES[file.rpartition(".")[2]]) for name, file in names.items()
        }
        self._rules = Map(
            [
                *(Rule(f"/{name}", endpoint="page", defaults={"name": name}, methods=["GET"]) for name in names),
                Rule("/items", endpoint="items", methods=["GET"]),
                Rule("/people", endpoint="people", methods=["GET"]),
                Rule("/picture/<int:row>/<view>", endpoint="picture", methods=["GET"]),
                Rule("/decide", endpoint="decide", methods=["POST"]),
                Rule("/undo", endpoint="undo", methods=["POST"]),
                Rule("/done", endpoint="done", methods=["POST"]),
            ]
        )

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Any:
        request = Request(environ)
        request.max_content_length = LARGEST_BODY
        try:
            response = self._answer(request)
        except HTTPException as error:
            response = Response(json.dumps({"error": error.description}), error.code, mimetype="application/json")
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        return response(environ, start)

    def _answer(self, request: Request) -> Response:
        if request.host.rpartition(":")[0] not in HOSTS and request.host not in HOSTS:
            raise Forbidden(f"this page answers to {' and '.join(HOSTS)} only")
        _, _, rest = request.path.partition("/")
        token, slash, rest = rest.partition("/")
        # As long for a wrong token as for the right one: none can be found out letter by letter.
        if not hmac.compare_digest(token.encode("utf-8", "replace"), self.token.encode()) or not slash:
            raise NotFound("the address needs the token that was printed with it")
        if request.method == "POST":
            _refuse_strangers(request)
        adapter = self._rules.bind(HERE, path_info=f"/{rest}", default_method=request.method)
        endpoint, values = adapter.match()
        answer: Response = getattr(self, f"_{endpoint}")(request, **values)
        return answer

    def _page(self, request: Request, name: str) -> Response:
        content, kind = self._files[name]
        return Response(content, mimetype=kind)

    def _items(self, request: Request) -> Response:
        with self._lock:
            decided = {number: self._told(number) for number in self.decisions.current}
            items = [self._item(item) for item in self.review.items]
            return _json(
                {
                    "task": self.review.task,
                    "root": shown(self.review.data.root),
                    "people": len(self.decisions.people),
                    "items": items,
                    "decisions": decided,
                }
            )

    def _item(self, item: Item) -> dict[str, Any]:
        path = self.review.index.name(item.rows[0]) if item.kind != "group" else ""
        suggestion = (item.line or {}).get("action", "")
        return {
            "kind": item.kind,
            "rows": item.rows,
            "mates": item.mates,
            "others": item.others,
            "person": shown(item.person),
            "suggested": shown(item.suggested),
            "confidence": item.confidence,
            "score": item.score,
            "other_score": item.other_score,
            "size": item.size,
            "path": shown(path),
            "advice": suggestion,
        }

    def _told(self, number: int) -> dict[str, str]:
        decision = self.decisions.current[number]
        return {"action": decision.action, "to": shown(decision.to)}

    def _people(self, request: Request) -> Response:
        with self._lock:
            return _json({"people": [shown(name) for name in self.decisions.find(request.args.get("q", ""))]})

    def _picture(self, request: Request, row: int, view: str) -> Response:
        if row >= len(self.review.index) or view not in VIEWS:
            raise NotFound("there is no such picture")
        response = Response(self.portraits.get(row, "face" if view == "face" else "whole"), mimetype="image/jpeg")
        response.headers["Cache-Control"] = FOREVER
        return response

    def _decide(self, request: Request) -> Response:
        asked = _body(request)
        number, action, to = asked.get("item"), asked.get("action"), asked.get("to", "")
        if type(number) is not int or not isinstance(action, str) or not isinstance(to, str):  # true is an int, too
            raise BadRequest("a decision has an item, an action and, for some, a name")
        with self._lock, _told_to_the_page():
            if not to and 0 <= number < len(self.review.items) and action in ("move", "merge"):
                to = self.review.items[number].suggested
            self.decisions.decide(number, action, to)
            return _json({"item": number, "decision": self._told(number), "counts": self.decisions.counts()})

    def _undo(self, request: Request) -> Response:
        _body(request)
        with self._lock, _told_to_the_page():
            number = self.decisions.undo()
            if number is None:
                raise Conflict("there is nothing to take back")
            left = self._told(number) if number in self.decisions.current else None
            return _json({"item": number, "decision": left, "counts": self.decisions.counts()})

    def _done(self, request: Request) -> Response:
        _body(request)
        with self._lock, _told_to_the_page():
            self.decisions.write_result(last=True)
            response = _json({"counts": self.decisions.counts(), "result": shown(str(self.decisions.result))})
            response.call_on_close(self.stop)  # not before the page has its answer
            return response


class _NotKept(HTTPException):
    code = 507  # Insufficient Storage


@contextlib.contextmanager
def _told_to_the_page() -> Iterator[None]:
    """What cannot be decided or kept is said on the page, and the review goes on."""
    try:
        yield
    except StorageError as error:
        raise _NotKept(shown(str(error))) from error
    except UnwritableName as error:
        raise BadRequest(str(error)) from error
    except ValueError as error:
        raise Conflict(str(error)) from error


def _refuse_strangers(request: Request) -> None:
    """A page of another origin sends what a form can send, and says where it is from."""
    origin, site = request.headers.get("Origin"), request.headers.get("Sec-Fetch-Site", "same-origin")
    if site != "same-origin" or origin not in (None, f"http://{request.host}"):
        raise Forbidden("only the page itself may decide")
    if request.mimetype != "application/json":
        raise BadRequest("a decision is JSON")


def _body(request: Request) -> dict[str, Any]:
    try:
        found = request.get_json()
    except RecursionError:
        raise BadRequest("the body is nested too deeply to be a decision") from None
    if not isinstance(found, dict):
        raise BadRequest("a decision is a JSON object")
    return found


def _json(value: Any) -> Response:
    return Response(json.dumps(files.strict(value), allow_nan=False), mimetype="application/json")


class _Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"  # a connection for each picture would take longer than the picture
    timeout = 60

    def log(self, type: str, message: str, *args: Any) -> None:
        """Nothing: addresses hold the token."""


def _bound(port: int) -> socket.socket:
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HERE, port))
        listening.listen(128)
    except (OSError, OverflowError) as error:
        listening.close()
        why = getattr(error, "strerror", None) or error
        raise ValueError(
            f"port {port} of {HERE} cannot be had: {why}; give another --port, or 0 for a free one"
        ) from None
    return listening


def goes_on(given: Any, untouched: Any) -> bool:
    """Whether a command line asks to go on with a review that is there, instead of making one.

    Args:
        given: the arguments of a command with `model`, `review` and `port`.
        untouched: the same where nothing but what such a review needs was given.

    Raises:
        ValueError: an option that would have no effect, or no model.
    """
    if given.port and not given.review:
        raise ValueError("--port has no effect without --review")
    if given.model is not None:
        return False
    if not given.review:
        raise ValueError("no MODEL was given; only --review goes on without one, with what was found before")
    changed = files.differences(dataclasses.asdict(untouched), dataclasses.asdict(given))
    idle = [name for name, _, _ in changed if name not in ("review", "port")]
    if idle:
        option = idle[0].replace("_", "-")
        raise ValueError(f"--{option} has no effect: --review without MODEL goes on with what was found before")
    return True


def review_here(folder: Path, port: int, tell: Callable[[str], None] = say) -> None:
    """Serves a review and says where it is, and in the end what was decided.

    Args:
        folder: as for `serve`.
        port: as for `serve`.
        tell: prints what was decided.

    Raises:
        ValueError: as `serve`.
        StorageError: as `serve`.
    """

    def announce(address: str) -> None:
        number = address.split(":")[2].partition("/")[0]
        complain(
            f"review at {address}\n  for a browser on this machine; from another one first ssh -L "
            f"{number}:{HERE}:{number} HOST.\n  Ctrl-C or the page's Done ends it, and nothing that was decided is lost"
        )

    tell(summary(serve(folder, port, announce)))


def serve(folder: Path, port: int, announce: Callable[[str], None]) -> Decisions:
    """Serves the review of a folder until its page says that this is all, or a signal does; then the table is written.

    Args:
        folder: that a `Review` was saved to.
        port: of this machine; 0 takes a free one.
        announce: told the address when the page can be opened.

    Raises:
        ValueError: there is no such review, it is open elsewhere, or the port cannot be had.
        StorageError: the table cannot be written.
    """
    review = Review.load(folder)
    with files.locked(folder), contextlib.closing(_bound(port)) as listening:
        decisions = Decisions(review, folder)
        for line in read_back(decisions):
            complain(message(line))
        decisions.write_result(last=True)  # now, not after an hour's work, is when a full disk should say so
        server: BaseWSGIServer
        # From a thread of its own: `shutdown` waits for the loop, which waits for the request that asked for it.
        application = Application(review, decisions, lambda: threading.Thread(target=server.shutdown).start())
        server = make_server(HERE, port, application, threaded=True, request_handler=_Quiet, fd=listening.fileno())
        with contextlib.closing(server.socket), _signals_interrupt(), contextlib.suppress(KeyboardInterrupt):
            announce(f"http://{HERE}:{listening.getsockname()[1]}/{application.token}/")
            server.serve_forever(poll_interval=0.1)
        decisions.write_result(last=True)
    return decisions


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Lets SIGTERM do what Ctrl-C does; in a thread that is not the main one signals are somebody else's."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
