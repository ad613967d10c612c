"""A gallery where it can be seen: at an address of this machine alone, or in one file that can be sent.

The server answers GET and HEAD of the first page, of users and of pictures by their numbers, and nothing else: no path
ever comes from a request. It listens on 127.0.0.1, and answers only who asks for it under such a name, so that no other
site's page can read it under a name of its own (DNS rebinding). Pictures are what `read_rgb` makes of a file, as PNG.
"""

import base64
import errno
import io
import re
import socketserver
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import zip_longest
from pathlib import Path
from threading import BoundedSemaphore
from typing import NamedTuple

from PIL import Image

from guided_diffusion_vae.config import UserError

from .gallery_contents import Gallery
from .gallery_page import POLICY, Shown, in_turn, page_of_all, page_of_everything, page_of_one, thumbs_of
from .html import write_text

HOST = "127.0.0.1"
HOSTS = re.compile(r"(127\.0\.0\.1|localhost)(:[0-9]{1,5})?", re.IGNORECASE)  # any port: it may be forwarded
ADDRESS = re.compile(r"/(user|thumb|image)/([0-9]{1,9})")
USUAL = 128  # small pictures are enlarged by a whole number up to this
MOST_BYTES = 15_000_000  # of pictures in one file, which then passes as a letter's attachment
READERS = 2  # pictures that are read at once: the largest takes 0.2 GB
IDLE_S = 60  # after which a silent connection is closed
HEADERS = {
    "Content-Security-Policy": f"{POLICY}; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",  # the same number is another picture in the next gallery at this port
}


def enlarged(size: tuple[int, int]) -> tuple[int, int]:
    """Width and height on a page: a whole number of times the picture's."""
    zoom = max(1, USUAL // max(size))
    return size[0] * zoom, size[1] * zoom


def reduced(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Width and height of a picture, reduced to so many pixels a side if it is larger."""
    scale = min(1.0, side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def png(image: Image.Image, side: int | None = None) -> bytes:
    """A picture as a PNG file, of at most so many pixels a side."""
    if side and max(image.size) > side:
        image = image.resize(reduced(image.size, side), Image.Resampling.BOX)
    data = io.BytesIO()
    image.save(data, format="PNG")
    return data.getvalue()


# ---- in one file -----------------------------------------------------------------------------------------------------


class Embedded:
    """Addresses within one file. Its pictures, up to a limit: a few of each user, then the next of every user in turn.

    Args:
        limit: bytes of pictures, as the text that they become.
    """

    home = "#"

    def __init__(self, gallery: Gallery, limit: int = MOST_BYTES):
        self.shown: dict[int, Shown] = {}
        self.thumbs = {number for person in gallery.people for few in thumbs_of(person) for number in few}
        self.unreadable, self.reduced, left = 0, False, limit
        turns = zip_longest(*map(in_turn, gallery.people))
        for number in (number for turn in turns for number in turn if number is not None):
            try:
                picture = gallery.pictures[number].read()
            except UserError:
                self.unreadable += 1
                continue
            src = "data:image/png;base64," + base64.b64encode(png(picture, gallery.side)).decode()
            left -= len(src) * (2 if number in self.thumbs else 1)
            if left < 0:
                break
            self.shown[number] = Shown(src, enlarged(reduced(picture.size, gallery.side)))
            self.reduced = self.reduced or max(picture.size) > gallery.side
        self.left_out = len(gallery.pictures) - len(self.shown) - self.unreadable

    def person(self, place: int) -> str:
        return f"#user-{place}"

    def thumb(self, number: int) -> str | None:
        return self.shown[number].src if number in self.thumbs and number in self.shown else None

    def picture(self, number: int) -> Shown | None:
        return self.shown.get(number)


def write(gallery: Gallery, path, limit: int = MOST_BYTES) -> str:
    """Write a gallery as one file; returns what was written and what was not, in a line."""
    at = Embedded(gallery, limit)
    said = f"{len(at.shown)} of {len(gallery.pictures)} pictures are in this file"
    if at.reduced:
        said += f", the larger ones reduced to {gallery.side} pixels"
    if at.left_out:
        said += f"; {at.left_out} are left out, for it holds at most {limit / 1e6:g} MB of them"
    if at.unreadable:
        said += f"; {at.unreadable} cannot be read"
    write_text(path, page_of_everything(gallery, at, said))
    return f"written: {path} ({Path(path).stat().st_size / 1e6:.1f} MB); {said}"


# ---- at an address ---------------------------------------------------------------------------------------------------


class Served:
    """Addresses at the server."""

    home = "/"

    def __init__(self, gallery: Gallery):
        self.gallery = gallery

    def person(self, place: int) -> str:
        return f"/user/{place}"

    def thumb(self, number: int) -> str:
        return f"/thumb/{number}"

    def picture(self, number: int) -> Shown:
        size = self.gallery.pictures[number].size()
        if size and max(size) > self.gallery.side:
            return Shown(f"/thumb/{number}", enlarged(reduced(size, self.gallery.side)), f"/image/{number}")
        return Shown(f"/image/{number}", size and enlarged(size))


class Answer(NamedTuple):
    """What is sent: a status, a type and its bytes."""

    status: int
    kind: str
    body: bytes


def answer(gallery: Gallery, path: str) -> Answer:
    """What there is at a path of the server."""
    if path == "/":
        return Answer(200, "text/html; charset=utf-8", page_of_all(gallery, Served(gallery)).encode())
    found = ADDRESS.fullmatch(path)
    number = int(found[2]) if found else 0
    if not found or number >= len(gallery.people if found[1] == "user" else gallery.pictures):
        return _words(404, "there is no such page; / lists what there is")
    if found[1] == "user":
        return Answer(200, "text/html; charset=utf-8", page_of_one(gallery, Served(gallery), number).encode())
    try:
        side = gallery.side if found[1] == "thumb" else None
        return Answer(200, "image/png", png(gallery.pictures[number].read(), side))
    except UserError as error:  # removed or damaged since it was listed
        return _words(404, str(error))


def _words(status: int, words: str) -> Answer:
    return Answer(status, "text/plain; charset=utf-8", f"{words}\n".encode(errors="replace"))


class Server(ThreadingHTTPServer):
    """A gallery at 127.0.0.1.

    Raises:
        UserError: the port is taken, or not for everybody.
    """

    request_queue_size = 64  # a browser asks for many pictures at once

    def __init__(self, gallery: Gallery, port: int):
        self.gallery, self.readers = gallery, BoundedSemaphore(READERS)
        try:
            super().__init__((HOST, port), Handler)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            why = "is taken by another program" if error.errno == errno.EADDRINUSE else "is not for everybody"
            raise UserError(f"--port {port} {why}; give another, or 0 for a free one") from error

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.server_address[1]}/"

    def server_bind(self):
        socketserver.TCPServer.server_bind(self)  # the class above it would ask a name server for our name

    def handle_error(self, request, client_address):
        """A traceback of a fault of ours; a reader who has left is none."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Who asks, and whether it may be answered."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "gallery", ""
    timeout = IDLE_S

    def do_GET(self):
        hosts = self.headers.get_all("Host", [])
        if "Content-Length" in self.headers or "Transfer-Encoding" in self.headers:
            self.close_connection = True  # what follows is not another request
        if len(hosts) != 1 or not HOSTS.fullmatch(hosts[0].strip()):
            self._send(_words(421, f"ask for {HOST} or localhost"))
            return
        with self.server.readers:
            reply = answer(self.server.gallery, self.path.partition("?")[0])
        self._send(reply)

    do_HEAD = do_GET

    def __getattr__(self, name):
        """Every other method is refused alike, also those that nobody has thought of."""
        if name.startswith("do_"):
            return lambda: self.send_error(405, "only GET and HEAD are answered")
        raise AttributeError(name)

    def send_error(self, code, message=None, explain=None):
        """In words, without a page; also what the class above finds wrong with a request."""
        self.close_connection = True
        self._send(_words(code, message or self.responses.get(code, ("an error",))[0]))

    def _send(self, reply: Answer):
        self.send_response(reply.status)
        headers = {"Content-Type": reply.kind, "Content-Length": str(len(reply.body)), **HEADERS}
        headers |= {"Allow": "GET, HEAD"} if reply.status == 405 else {}
        headers |= {"Connection": "close"} if self.close_connection else {}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    def log_message(self, *words):
        """Nothing: the address is all that is printed."""


def serve(server: Server) -> None:
    """Answer until Ctrl-C."""
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
