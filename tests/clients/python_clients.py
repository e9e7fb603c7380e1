"""HTTP clients of Python against builtin:echo: python_clients.py CLIENT PORT. One line a behaviour: its name, then `ok` or why not.

`echo` has 4 MiB as its limit for bodies (see scripts/clients).
"""

import asyncio
import http.client
import json
import sys
import time
import traceback

MIB = 1 << 20


def pieces(count=100):
    for number in range(count):
        yield b"%06d\n" % number * 1000


WHOLE = b"".join(pieces()).decode()


class HttpClient:
    """http.client of the standard library."""

    def __init__(self, port):
        self.port = port

    def connection(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def ask(self, connection, method="GET", path="/", **options):
        connection.request(method, path, **options)
        response = connection.getresponse()
        return response.status, response.read()

    def keep_alive(self):
        connection = self.connection()
        remotes = {json.loads(self.ask(connection, path=f"/{n}")[1])["remote"] for n in range(5)}
        assert len(remotes) == 1, remotes

    def chunked(self):
        status, body = self.ask(self.connection(), "POST", body=pieces(), encode_chunked=True, headers={"Transfer-Encoding": "chunked"})
        assert status == 200 and json.loads(body)["body"] == WHOLE

    def http_1_0(self):
        connection = self.connection()
        connection._http_vsn, connection._http_vsn_str = 10, "HTTP/1.0"
        status, body = self.ask(connection)
        assert status == 200 and json.loads(body)["version"] == "HTTP/1.0"

    def early(self):
        status, _ = self.ask(self.connection(), "POST", body=b"x" * (20 * MIB))
        assert status == 413, status

    def slow_read(self):
        connection = self.connection()
        connection.request("POST", "/", body=b"x" * (3 * MIB))
        response = connection.getresponse()
        length = 0
        while piece := response.read(256 << 10):
            length += len(piece)
            time.sleep(0.05)
        assert length == int(response.headers["Content-Length"]) > 3 * MIB, length

    def behaviours(self):
        return ["keep_alive", "chunked", "http_1_0", "early", "slow_read"]


class Requests(HttpClient):
    """requests, and so urllib3."""

    def __init__(self, port):
        import requests

        self.url = f"http://127.0.0.1:{port}/"
        self.session = requests.Session()

    def keep_alive(self):
        remotes = {self.session.get(self.url).json()["remote"] for _ in range(5)}
        assert len(remotes) == 1, remotes

    def chunked(self):
        answer = self.session.post(self.url, data=pieces())
        assert answer.status_code == 200 and answer.json()["body"] == WHOLE

    def early(self):
        assert self.session.post(self.url, data=b"x" * (20 * MIB)).status_code == 413
        assert self.session.get(self.url).status_code == 200, "the next request finds a connection of its own"

    def slow_read(self):
        answer = self.session.post(self.url, data=b"x" * (3 * MIB), stream=True)
        length = 0
        for piece in answer.iter_content(256 << 10):
            length += len(piece)
            time.sleep(0.05)
        assert length == int(answer.headers["Content-Length"]) > 3 * MIB, length

    def behaviours(self):
        return ["keep_alive", "chunked", "early", "slow_read"]


class Aiohttp(HttpClient):
    """aiohttp."""

    def __init__(self, port):
        import aiohttp

        self.aiohttp = aiohttp
        self.url = f"http://127.0.0.1:{port}/"

    def run(self, story):
        async def within():
            async with self.aiohttp.ClientSession(connector=self.aiohttp.TCPConnector(limit=1)) as session:
                await story(session)

        asyncio.run(asyncio.wait_for(within(), 60))

    def keep_alive(self):
        async def story(session):
            remotes = set()
            for _ in range(5):
                async with session.get(self.url) as answer:
                    remotes.add((await answer.json())["remote"])
            assert len(remotes) == 1, remotes

        self.run(story)

    def post(self, wanted, **options):
        async def story(session):
            async with session.post(self.url, **options) as answer:
                assert answer.status == wanted, answer.status
                if wanted == 200:
                    assert (await answer.json())["body"] == WHOLE

        self.run(story)

    def chunked(self):
        async def generate():
            for piece in pieces():
                yield piece

        self.post(200, data=generate())

    def expect(self):
        self.post(200, data=WHOLE.encode(), expect100=True)

    def early(self):
        self.post(413, data=b"x" * (20 * MIB))

    def slow_read(self):
        async def story(session):
            async with session.post(self.url, data=b"x" * (3 * MIB)) as answer:
                length = 0
                async for piece in answer.content.iter_chunked(256 << 10):
                    length += len(piece)
                    await asyncio.sleep(0.05)
                assert length == int(answer.headers["Content-Length"]) > 3 * MIB, length

        self.run(story)

    def behaviours(self):
        return ["keep_alive", "chunked", "expect", "early", "slow_read"]


CLIENTS = {"http.client": HttpClient, "requests": Requests, "aiohttp": Aiohttp}


def main():
    client = CLIENTS[sys.argv[1]](int(sys.argv[2]))
    for behaviour in client.behaviours():
        try:
            getattr(client, behaviour)()
            print(behaviour, "ok", flush=True)
        except Exception as error:
            traceback.print_exc()
            print(behaviour, f"{type(error).__name__}: {error}".replace("\n", " ")[:200], flush=True)


main()
