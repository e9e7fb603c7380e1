"""Flask: pages, forms, files, streams, sessions, errors."""

import hashlib

from harness import HERE, Clients, File, pattern, serve, with_both_clients

server = proxied = None


def setUpModule():
    global server, proxied
    server = serve("flask_app:app")
    proxied = serve("flask_app:behind_a_proxy")


def sha256(data):
    return hashlib.sha256(data).hexdigest()


@with_both_clients
class Flask(Clients):
    def test_a_page(self):
        answer = self.get("/")
        self.assertEqual((answer.status, answer.reason), (200, "OK"))
        self.assertEqual(answer.header("Content-Type"), "text/html; charset=utf-8")
        self.assertIn("<title>caf\u00e9 &amp; more</title>", answer.text)
        self.assertIn("<li>&lt;one&gt;</li>", answer.text)
        head = self.browser.ask("HEAD", "/")
        self.assertEqual(head.header("Content-Length"), str(len(answer.body)))

    def test_a_path_with_letters_of_all_kinds(self):
        for sent, name in [("caf%C3%A9", "caf\u00e9"), ("%E2%82%AC%20%25", "\u20ac %")]:
            self.assertEqual(self.get("/hello/" + sent).text, "hello " + name)

    def test_what_a_path_allows(self):
        answer = self.browser.ask("OPTIONS", "/raw")
        self.assertEqual(answer.status, 200)
        self.assertEqual(set(answer.header("Allow").split(", ")), {"POST", "OPTIONS"})
        self.assertEqual(self.get("/raw").status, 405)

    def test_an_upload(self):
        small, large = b"small\r\n--not a boundary\r\n", pattern(3000000)
        files = [
            File("small", "notes.txt", small, "text/plain"),
            File("large", "large.bin", large),
            File("empty", "empty.bin", b""),
        ]
        answer = self.post("/upload", fields={"title": "a b+c&d=\u00e9"}, files=files)
        self.assertEqual(answer.status, 200, answer)
        self.assertEqual(answer.json()["form"], {"title": "a b+c&d=\u00e9"})
        self.assertEqual(
            answer.json()["files"],
            {
                "small": {"name": "notes.txt", "type": "text/plain", "sha256": sha256(small)},
                "large": {
                    "name": "large.bin",
                    "type": "application/octet-stream",
                    "sha256": sha256(large),
                },
                "empty": {
                    "name": "empty.bin",
                    "type": "application/octet-stream",
                    "sha256": sha256(b""),
                },
            },
        )

    def test_a_body_with_a_length_and_one_in_chunks(self):
        for size in (1, 70000, 2000000):
            body = pattern(size)
            told = {"sha256": sha256(body), "length": size, "told": size}
            self.assertEqual(self.post("/raw", data=body).json(), told)
            chunks = [body[at : at + 30000] for at in range(0, size, 30000)]
            self.assertEqual(self.post("/raw", chunks=chunks).json(), told)

    def test_json_both_ways(self):
        headers = [("Content-Type", "application/json")]
        answer = self.post("/json", headers=headers, data=b'{"a": [1, null, "\\u20ac"]}')
        self.assertEqual((answer.status, answer.json()), (201, {"a": [1, None, "\u20ac"]}))
        self.assertEqual(self.post("/json", headers=headers, data=b"{").status, 400)
        self.assertEqual(self.post("/json", data=b"{}").status, 415)

    def test_a_stream_that_looks_at_its_request(self):
        for lines in (0, 3, 50000):
            answer = self.get("/stream?word=line&lines=%d" % lines)
            self.assertEqual(answer.status, 200)
            self.assertEqual(answer.text, "".join("line %d\n" % at for at in range(lines)))

    def test_server_sent_events(self):
        answer = self.get("/events")
        self.assertEqual(answer.text, "data: first\n\ndata: second\n\n")
        self.assertTrue(answer.header("Content-Type").startswith("text/event-stream"))

    def test_a_session_in_a_cookie(self):
        self.assertEqual([self.get("/count").text for _ in range(3)], ["1", "2", "3"])
        self.assertEqual(self.new_client().ask("GET", "/count").text, "1")

    def test_a_login_with_several_cookies_and_a_redirection(self):
        self.assertEqual(self.get("/account").status, 403)
        answer = self.post("/login", fields={"user": "J\u00fcrgen"})
        self.assertEqual((answer.status, answer.header("Location")), (302, "/account"))
        self.assertEqual(len(answer.values("Set-Cookie")), 3)
        account = self.get("/account").json()
        self.assertEqual(account["user"], "J\u00fcrgen")
        self.assertEqual(account["messages"], ["welcome, J\u00fcrgen"])
        self.assertEqual(account["cookies"], {"theme": "dark", "language": "d\u00e9"})
        self.assertEqual(self.get("/account").json()["messages"], [])
        again = self.post("/login", fields={"user": "Ada"}, follow=True)
        self.assertEqual((again.status, again.json()["user"]), (200, "Ada"))
        self.assertTrue(self.browser.effective_url.endswith("/account"))

    def test_a_permanent_redirection(self):
        answer = self.get("/old")
        self.assertEqual((answer.status, answer.header("Location")), (301, "/hello/moved"))
        self.assertEqual(self.get("/old", follow=True).text, "hello moved")

    def test_an_external_url_is_what_the_client_used(self):
        self.assertEqual(self.get("/external").text, server.url + "/hello/x")
        named = self.get("/external", headers=[("Host", "example.com:1234")])
        self.assertEqual(named.text, "http://example.com:1234/hello/x")

    def test_an_external_url_behind_a_proxy_is_what_its_client_used(self):
        headers = [("Host", "example.com"), ("X-Forwarded-Proto", "https")]
        answer = self.get("/external", headers=headers)
        self.assertEqual(answer.text, "https://example.com/hello/x")
        browser = self.new_client(proxied)
        headers += [("X-Forwarded-Host", "example.org"), ("X-Forwarded-Prefix", "/shop")]
        answer = browser.ask("GET", "/external", headers=headers)
        self.assertEqual(answer.text, "https://example.org/shop/hello/x")

    def test_the_client_is_who_the_proxy_says(self):
        self.assertEqual(self.get("/who").json()["remote"], "127.0.0.1")
        headers = [("X-Forwarded-For", "203.0.113.9"), ("X-Forwarded-Proto", "https")]
        told = self.get("/who", headers=headers).json()
        self.assertEqual((told["remote"], told["secure"]), ("203.0.113.9", True))

    def test_a_connection_serves_one_request_after_the_other(self):
        ports = self.browser.in_a_row("/port", 5)
        self.assertEqual(ports, 5 * ports[:1])

    def test_a_file_whole_in_part_and_not_again(self):
        with open(HERE + "/flask_app.py", "rb") as file:
            data = file.read()
        answer = self.get("/file")
        self.assertEqual((answer.status, answer.body), (200, data))
        self.assertEqual(answer.header("Content-Length"), str(len(data)))
        head = self.browser.ask("HEAD", "/file")
        self.assertEqual(head.header("Content-Length"), str(len(data)))
        part = self.get("/file", headers=[("Range", "bytes=10-19")])
        self.assertEqual((part.status, part.body), (206, data[10:20]))
        self.assertEqual(part.header("Content-Range"), "bytes 10-19/%d" % len(data))
        again = self.get("/file", headers=[("If-None-Match", answer.header("ETag"))])
        self.assertEqual((again.status, again.body), (304, b""))
        beyond = self.get("/file", headers=[("Range", "bytes=9999999-")])
        self.assertEqual(beyond.status, 416)

    def test_error_pages(self):
        answer = self.get("/nowhere%3Cb%3E")
        self.assertEqual(
            (answer.status, answer.text), (404, "<h1>nothing at /nowhere&lt;b&gt;</h1>")
        )
        self.assertIn("error", self.get("/account").json())
        failed = self.get("/fail")
        self.assertEqual(failed.status, 500)
        self.assertIn("Internal Server Error", failed.text)
        self.assertNotIn("this view fails", failed.text)
        self.assert_logged("RuntimeError: this view fails")
        self.assertEqual(self.get("/").status, 200)

    def test_a_stream_that_fails_does_not_look_complete(self):
        # What a client raises is its own; that it does is the point.
        with self.assertRaises(Exception) as caught:
            self.get("/fail-in-the-middle")
        self.assertNotIsInstance(caught.exception, AssertionError)
        self.assert_logged("RuntimeError: this stream fails")
        self.assertEqual(self.get("/").status, 200)
