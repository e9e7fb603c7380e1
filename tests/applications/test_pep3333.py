"""PEP 3333, clause by clause, from the wire to the application and back.

`ask` sends a request, and afterwards another one on the same connection: whatever an application
did, the next request is served, or the connection ends because the answer said so.
"""

import itertools
import json
import os
import subprocess
import tempfile
import unittest

from harness import Wire, eventually, pattern, serve

server = None
keys = itertools.count()


def setUpModule():
    global server
    server = serve("pep3333_app:app")


class Clause(unittest.TestCase):
    maxDiff = None

    def setUp(self):
        self.log_begins = len(server.text)
        self.key = "%s.%d" % (self.id(), next(keys))

    def wire(self):
        wire = Wire(server)
        self.addCleanup(wire.close)
        return wire

    def ask(self, target, method="GET", then="kept", **keywords):
        wire = self.wire()
        answer = wire.ask(target, method, **keywords)
        if then == "kept":
            self.assertTrue(answer.whole, answer)
            self.assertIsNone(answer.header("Connection"), answer)
            self.assertEqual(wire.ask("/hello").body, b"hello")
        else:
            self.assertTrue(wire.ended(), wire.pending)
            self.assertEqual(answer.header("Connection"), "close" if then == "closed" else None)
        wire.close()
        return answer

    def environ(self, target="/environ", **keywords):
        return {key: value for key, (_, value) in self.typed_environ(target, **keywords).items()}

    def typed_environ(self, target="/environ", **keywords):
        """{key: [name of its type, its value]}"""
        return json.loads(self.ask(target, **keywords).body)

    def notes(self, count):
        """What the application noted for this test, once there is so much of it."""
        found = []

        wire = self.wire()

        def enough():
            found[:] = json.loads(wire.ask("/notes?" + self.key).body)
            return len(found) >= count

        eventually(enough, "%d notes" % count)
        return found

    def assert_logged(self, what):
        server.wait_for_log(what, self.log_begins)

    def assert_failed(self, answer, logged):
        self.assertEqual((answer.status, answer.reason), (500, "Internal Server Error"))
        self.assertNotIn(b"Traceback", answer.body)
        self.assert_logged(logged)
        # A mistake is told in words, without the lines of uringd that noticed it.
        for ours in ("in respond", "in serve"):
            self.assertNotIn(ours, server.text[self.log_begins :])


class TheEnviron(Clause):
    def test_is_a_dict_with_every_required_key_of_the_required_type(self):
        environ = self.typed_environ("/environ?a=b")
        self.assertEqual(environ.pop("itself"), ["dict", True])
        for key in (
            "REQUEST_METHOD SCRIPT_NAME PATH_INFO QUERY_STRING SERVER_NAME SERVER_PORT"
            " SERVER_PROTOCOL wsgi.url_scheme REMOTE_ADDR REMOTE_PORT SERVER_SOFTWARE"
            " REQUEST_URI RAW_URI"
        ).split():
            self.assertEqual(environ[key][0], "str", key)
        self.assertEqual(environ["wsgi.version"], ["tuple", "(1, 0)"])
        for key in ("wsgi.multithread", "wsgi.multiprocess", "wsgi.run_once"):
            self.assertEqual(environ[key][0], "bool", key)
        self.assertFalse(environ["wsgi.run_once"][1])
        self.assertIn("wsgi.input", environ)
        self.assertIn("wsgi.errors", environ)
        self.assertEqual(environ["wsgi.input_terminated"], ["bool", True])
        self.assertEqual(environ["uringd.queue_seconds"][0], "float")
        self.assertEqual(environ["uringd.deadline"][0], "float")
        for key, (kind, value) in environ.items():
            if "." not in key:
                self.assertEqual(kind, "str", key)
                value.encode("latin-1")

    def test_says_whether_other_threads_run_the_application_too(self):
        others = {"--threads", "gevent"}.intersection(server.process.args)
        self.assertEqual(self.environ()["wsgi.multithread"], bool(others))

    def test_names_method_protocol_and_address(self):
        environ = self.environ(method="DELETE")
        self.assertEqual(environ["REQUEST_METHOD"], "DELETE")
        self.assertEqual(environ["SERVER_PROTOCOL"], "HTTP/1.1")
        self.assertEqual(environ["SERVER_NAME"], server.host)
        self.assertEqual(environ["SERVER_PORT"], str(server.port))
        self.assertEqual(environ["REMOTE_ADDR"], "127.0.0.1")
        self.assertEqual(environ["HTTP_HOST"], "example.com")
        self.assertEqual(environ["wsgi.url_scheme"], "http")
        old = self.environ(version="1.0", then="closed")
        self.assertEqual(old["SERVER_PROTOCOL"], "HTTP/1.0")

    def test_has_the_length_and_type_of_a_body_when_there_is_one_and_only_then(self):
        environ = self.environ()
        self.assertNotIn("CONTENT_LENGTH", environ)
        self.assertNotIn("CONTENT_TYPE", environ)
        environ = self.environ(method="POST", body=b"abc", fields=[("Content-Type", "a/b; c=d")])
        self.assertEqual((environ["CONTENT_LENGTH"], environ["CONTENT_TYPE"]), ("3", "a/b; c=d"))
        self.assertEqual(self.environ(method="POST", body=b"")["CONTENT_LENGTH"], "0")
        chunked = self.environ(method="POST", chunks=[b"abc", b"de"])
        self.assertEqual(chunked["CONTENT_LENGTH"], "5")
        for environ in (environ, chunked):
            for key in ("HTTP_CONTENT_LENGTH", "HTTP_CONTENT_TYPE", "HTTP_TRANSFER_ENCODING"):
                self.assertNotIn(key, environ)

    def test_has_the_path_decoded_as_latin_1_and_the_query_as_it_was_sent(self):
        for sent, path in [
            ("/environ/caf%C3%A9", "/environ/caf\xc3\xa9"),
            ("/environ/%e2%82%ac", "/environ/\xe2\x82\xac"),
            ("/environ/%FF", "/environ/\xff"),
            ("/environ/a%2Fb%20c%25", "/environ/a/b c%"),
            ("/environ/a%252F", "/environ/a%2F"),
            ("/environ/a%2&%zz%", "/environ/a%2&%zz%"),
            ("/environ/a+b;c=d", "/environ/a+b;c=d"),
            ("/environ//double/", "/environ//double/"),
        ]:
            target = sent + "?a=%C3%A9&b=+%2F&c=%zz"
            environ = self.environ(target)
            self.assertEqual(environ["SCRIPT_NAME"], "")
            self.assertEqual(environ["PATH_INFO"], path)
            self.assertEqual(environ["QUERY_STRING"], "a=%C3%A9&b=+%2F&c=%zz")
            self.assertEqual((environ["RAW_URI"], environ["REQUEST_URI"]), (target, target))
        self.assertEqual(self.environ("/environ?")["QUERY_STRING"], "")
        self.assertEqual(self.environ("/environ")["QUERY_STRING"], "")

    def test_has_the_path_of_a_target_in_any_form(self):
        environ = self.environ("http://example.com/environ/a?b=c")
        self.assertEqual((environ["PATH_INFO"], environ["QUERY_STRING"]), ("/environ/a", "b=c"))
        self.assertEqual(environ["RAW_URI"], "http://example.com/environ/a?b=c")
        # The target of a whole server has no path, and CGI's is empty or begins with a slash.
        environ = self.environ("*", method="OPTIONS")
        self.assertEqual((environ["PATH_INFO"], environ["RAW_URI"]), ("", "*"))

    def test_joins_fields_of_one_name_and_drops_those_that_could_pass_for_others(self):
        fields = [
            ("X-Several", "a"),
            ("Cookie", "a=1"),
            ("x-several", "b, c"),
            ("Cookie", "b=2"),
            ("X_Several", "forged"),
            ("Proxy", "http://forged"),
            ("X-Word", "caf\xe9"),
            ("X-Empty", ""),
            ("X-Padded", " \t padded \t "),
        ]
        environ = self.environ(fields=fields)
        self.assertEqual(environ["HTTP_X_SEVERAL"].replace(", ", ","), "a,b,c")
        self.assertEqual(environ["HTTP_COOKIE"], "a=1; b=2")
        self.assertEqual(environ["HTTP_X_WORD"], "caf\xe9")
        self.assertEqual((environ["HTTP_X_EMPTY"], environ["HTTP_X_PADDED"]), ("", "padded"))
        self.assertNotIn("HTTP_PROXY", environ)
        self.assert_logged("left out")

    def test_believes_a_trusted_proxy_about_the_client_and_its_scheme(self):
        fields = [("X-Forwarded-For", "203.0.113.7"), ("X-Forwarded-Proto", "https")]
        environ = self.environ(fields=fields)
        self.assertEqual(environ["wsgi.url_scheme"], "https")
        self.assertEqual(environ["REMOTE_ADDR"], "203.0.113.7")

    def test_is_the_applications_own_to_change(self):
        self.assertEqual(self.ask("/reuse").body, b"None")
        self.assertEqual(self.ask("/reuse").body, b"None")
        self.assertIn("wsgi.version", self.environ())


class TheInput(Clause):
    BODY = b"first line\nsecond line\nthird, without an end"
    LARGE = BODY + b"\n" + pattern(100000)

    def read(self, call, body=BODY, **keywords):
        """What a call gave, as the application's text; and everything after it was as PEP 3333
        has it: the rest, then nothing, however it is asked for.
        """
        fields = [("X-Call", call)]
        answers = [self.ask("/read", "POST", body=body, fields=fields).body]
        halves = [body[: len(body) // 2], body[len(body) // 2 :]]
        answers.append(self.ask("/read", "POST", chunks=halves, fields=fields).body)
        self.assertEqual(*answers)
        got, (rest, *after) = eval(answers[0])
        self.assertEqual(after, [b"", b"", b"", []])
        return got, rest

    def test_read_takes_all_or_so_many_bytes_and_nothing_beyond_the_end(self):
        for body in (self.BODY, self.LARGE):
            for call in ("input.read()", "input.read(-1)", "input.read(1000000)"):
                self.assertEqual(self.read(call, body), (body, b""))
            self.assertEqual(self.read("input.read(5)", body), (body[:5], body[5:]))
            self.assertEqual(self.read("input.read(0)", body), (b"", body))

    def test_readline_takes_a_line_or_a_part_of_it(self):
        for body in (self.BODY, self.LARGE):
            self.assertEqual(self.read("input.readline()", body), (body[:11], body[11:]))
            self.assertEqual(self.read("input.readline(5)", body), (body[:5], body[5:]))
            self.assertEqual(self.read("input.readline(500)", body), (body[:11], body[11:]))

    def test_readlines_takes_all_lines_or_about_as_much_as_the_hint(self):
        for body in (self.BODY, self.LARGE):
            lines = body.splitlines(True)
            self.assertEqual(self.read("input.readlines()", body), (lines, b""))
            self.assertEqual(self.read("input.readlines(5)", body), (lines[:1], body[11:]))
            self.assertEqual(self.read("input.readlines(12)", body), (lines[:2], body[23:]))

    def test_iterating_gives_its_lines(self):
        for body in (self.BODY, self.LARGE):
            self.assertEqual(self.read("list(input)", body), (body.splitlines(True), b""))
            self.assertEqual(self.read("next(input)", body), (body[:11], body[11:]))

    def test_is_there_and_empty_without_a_body(self):
        answer = self.ask("/read", fields=[("X-Call", "(input.read(), list(input))")])
        self.assertEqual(eval(answer.body), ((b"", []), [b"", b"", b"", b"", []]))

    def test_a_body_that_is_not_read_is_not_taken_for_the_next_request(self):
        for body in (b"GET /evil HTTP/1.1\r\nHost: a\r\n\r\n", self.LARGE):
            self.assertEqual(self.ask("/hello", "POST", body=body).body, b"hello")
            self.assertEqual(self.ask("/hello", "POST", chunks=[body]).body, b"hello")

    def test_bodies_of_every_size_arrive_whole(self):
        for size in (1, 65535, 65536, 65537, 1000000, 5000000):
            body = pattern(size)
            answer = self.ask("/echo", "POST", body=body)
            self.assertTrue(answer.body == body, size)
            answer = self.ask("/echo", "POST", chunks=[body[:100], body[100:]])
            self.assertTrue(answer.body == body, size)
            self.assertEqual(answer.header("X-Length"), str(size))


class TheErrors(Clause):
    def test_are_written_to_the_log_line_by_line_with_the_request(self):
        self.ask("/errors")
        for line in (
            "written, and the rest of the line",
            "one of several",
            "two of several",
            "without an end, but flushed",
            "printed to it",
        ):
            self.assert_logged("] " + line)


class StartResponse(Clause):
    def test_called_twice_without_exc_info_is_an_error(self):
        self.assert_failed(self.ask("/twice"), "a second time without exc_info")

    def test_called_again_with_exc_info_replaces_what_was_not_sent(self):
        answer = self.ask("/replaced")
        self.assertEqual((answer.status, answer.reason), (503, "Replaced"))
        self.assertEqual((answer.header("X-Now"), answer.header("X-Of")), ("the second", None))
        self.assertEqual(answer.body, b"an error page")
        answer = self.ask("/last_moment")
        self.assertEqual((answer.status, answer.body), (503, b"replaced"))

    def test_called_with_exc_info_after_something_was_sent_raises_it(self):
        answer = self.ask("/too_late?" + self.key, then="cut off")
        self.assertEqual((answer.status, answer.body), (200, b"sent already"))
        self.assertFalse(answer.whole)
        self.assertEqual(self.notes(2), ["something went wrong too late", "closed"])
        self.assert_logged("ValueError: something went wrong too late")

    def test_never_called_is_an_error(self):
        self.assert_failed(self.ask("/never"), "without having called start_response")
        self.assert_failed(self.ask("/never_iterated"), "before it called start_response")

    def test_may_be_called_when_the_iterable_is_first_asked(self):
        answer = self.ask("/lazily")
        self.assertEqual((answer.status, answer.reason), (201, "Lazily"))
        self.assertEqual(answer.body, b"started when it was first iterated")

    def test_keeps_status_and_reason_however_unusual(self):
        for status, reason in [
            ("200 OK", "OK"),
            ("200 Fine, thank you", "Fine, thank you"),
            ("218 This Is Fine", "This Is Fine"),
            ("299 ", ""),
            ("200", ""),
            ("418 I'm a Teapot (really)", "I'm a Teapot (really)"),
            ("451 Unavailable For Legal Reasons", "Unavailable For Legal Reasons"),
            ("599 Network Connect Timeout Error", "Network Connect Timeout Error"),
        ]:
            answer = self.ask("/status", fields=[("X-Status", status)])
            self.assertEqual((answer.status, answer.reason), (int(status[:3]), reason))
            self.assertEqual(answer.body, b"body")

    def test_with_a_status_that_is_none_is_an_error(self):
        for status in ("OK", "20 OK", "2000 OK", "100 Continue", "101 Up", "-20 OK", "200OK"):
            answer = self.ask("/status", fields=[("X-Status", status)])
            self.assert_failed(answer, "the status %r is not" % status)
        answer = self.ask("/status", fields=[("X-Status", "600 Beyond")])
        self.assert_failed(answer, "a status outside 200 to 599")

    def test_keeps_fields_in_their_order_and_several_of_one_name_apart(self):
        answer = self.ask("/fields?several")
        of_the_application = [
            field for field in answer.headers if field[0].lower() in ("x-a", "x-b", "set-cookie")
        ]
        wanted = [("X-B", "1"), ("Set-Cookie", "a=1"), ("x-a", "2"), ("Set-Cookie", "b=2")]
        self.assertEqual(of_the_application, wanted + [("X-B", "3")])
        self.assertEqual(self.ask("/fields?latin").header("X-Word"), "caf\xe9")
        self.assertEqual(self.ask("/fields?empty").header("X-Empty"), "")

    def test_server_and_date_are_sent_unless_the_application_says_them(self):
        answer = self.ask("/hello")
        self.assertEqual(answer.values("Server"), ["uringd"])
        self.assertRegex(answer.header("Date"), r"^\w{3}, \d\d \w{3} \d{4} [\d:]{8} GMT$")
        answer = self.ask("/fields?own")
        self.assertEqual(answer.values("Server"), ["mine"])
        self.assertEqual(answer.values("Date"), ["Thu, 01 Jan 1970 00:00:00 GMT"])

    def test_fields_of_the_connection_are_dropped_and_said_to_be(self):
        answer = self.ask("/fields?hop")
        for name in ("Connection", "Keep-Alive", "Transfer-Encoding", "Upgrade"):
            self.assertIsNone(answer.header(name), name)
        self.assertEqual((answer.header("X-Kept"), answer.body), ("yes", b"body"))
        self.assertEqual((answer.framing, answer.header("Content-Length")), ("length", "4"))
        for name in ("Keep-Alive", "Transfer-Encoding", "Upgrade"):
            server.wait_for_log('name="%s"' % name)

    def test_the_wish_to_close_is_granted(self):
        self.assertEqual(self.ask("/fields?wish", then="closed").body, b"body")

    def test_fields_that_http_does_not_have_are_errors(self):
        for kind, logged in [
            ("beyond", "has characters beyond latin-1"),
            ("name", "whose name is not a token"),
            ("name-of-bytes", "whose name is not a token"),
            ("space", "whose name is not a token"),
            ("colon", "whose name is not a token"),
            ("nameless", "whose name is not a token"),
            ("split", "has a line break"),
            ("newline", "has a line break"),
            ("return", "control character"),
            ("nul", "control character"),
            ("number", "is int, not str"),
            ("bytes", "is bytes, not str"),
            ("triple", "is not a tuple of name and value"),
        ]:
            with self.subTest(kind):
                answer = self.ask("/fields?" + kind)
                self.assert_failed(answer, logged)
                self.assertEqual(answer.values("Set-Cookie"), [])
                self.log_begins = len(server.text)
        self.assert_failed(self.ask("/no_list"), "are NoneType, not a list")


class Write(Clause):
    def test_sends_and_what_is_returned_follows(self):
        self.assertEqual(self.ask("/write").body, b"written, twice, then returned")
        self.assertEqual(self.ask("/write_only").body, b"all of it")
        head = self.ask("/write", "HEAD")
        self.assertEqual((head.status, head.body), (200, b""))

    def test_and_yield_send_at_once(self):
        for target in ("/write_at_once", "/yield_at_once"):
            with tempfile.TemporaryDirectory() as directory:
                mark = os.path.join(directory, "seen")
                wire = self.wire()
                wire.request("%s?%s" % (target, mark))
                self.assertEqual(wire.head().header("Transfer-Encoding"), "chunked")
                self.assertEqual((wire.read_until(b"\r\n"), wire.read(7)), (b"5", b"first\r\n"))
                with open(mark, "w"):
                    pass
                self.assertIn(b"second", wire.read_until(b"0\r\n\r\n"))

    def test_of_text_is_an_error(self):
        self.assert_failed(self.ask("/write_text"), "is str, not bytes")


class TheIterable(Clause):
    def returned(self, kind, **keywords):
        return self.ask("/returned?" + kind, **keywords)

    def test_that_is_a_list_or_tuple_is_sent_with_its_length(self):
        for kind, body in [
            ("list", b"onetwo"),
            ("tuple", b"onetwo"),
            ("empty-list", b""),
            ("list-of-nothing", b""),
            ("bytearray", b"onetwo"),
        ]:
            answer = self.returned(kind)
            self.assertEqual((answer.body, answer.framing), (body, "length"), kind)

    def test_of_unknown_length_is_sent_in_chunks_and_of_nothing_with_length_0(self):
        for kind, body, framing in [
            ("generator", b"onetwo", "chunks"),
            ("dict", b"onetwo", "chunks"),
            ("empty-iterator", b"", "length"),
            ("iterator-of-nothing", b"", "length"),
        ]:
            answer = self.returned(kind)
            self.assertEqual((answer.body, answer.framing), (body, framing), kind)
        for kind in ("set-of-one", "deque-of-one"):
            self.assertEqual(self.returned(kind).body, b"one")

    def test_is_sent_to_an_http_1_0_client_until_the_end_of_the_connection(self):
        answer = self.returned("generator", version="1.0", then="closed")
        self.assertEqual((answer.body, answer.framing), (b"onetwo", "end"))
        fields = [("Connection", "keep-alive")]
        answer = self.returned("generator", version="1.0", fields=fields, then="closed")
        self.assertEqual((answer.body, answer.framing), (b"onetwo", "end"))
        wire = self.wire()
        for _ in range(2):
            answer = wire.ask("/returned?list", version="1.0", fields=fields)
            self.assertEqual((answer.body, answer.framing), (b"onetwo", "length"))
            self.assertEqual(answer.header("Connection"), "keep-alive")
        answer = self.returned("list", version="1.0", then="closed")
        self.assertEqual((answer.body, answer.framing), (b"onetwo", "length"))

    def test_that_fails_before_its_first_piece_is_a_500(self):
        answer = self.ask("/close_early?" + self.key)
        self.assert_failed(answer, "ValueError: before the first piece")

    def test_that_fails_in_the_middle_ends_the_connection_without_the_last_chunk(self):
        answer = self.ask("/close_middle?" + self.key, then="cut off")
        self.assertEqual((answer.status, answer.body, answer.whole), (200, b"one", False))
        self.assert_logged("ValueError: in the middle")
        wire = self.wire()
        answer = wire.ask("/close_middle?" + self.key, version="1.0")
        self.assertEqual((answer.status, answer.whole), (200, False), "only a reset tells")

    def test_of_anything_but_bytes_is_an_error_that_says_so(self):
        for kind, logged in [
            ("text", "is str, not bytes: 't'"),
            ("list-of-text", "a list with something other than bytes in it"),
            ("iterator-of-text", "is str, not bytes: 'one'"),
            ("bytes", "is int, not bytes"),
            ("none", "no iterable of bytes"),
            ("number", "no iterable of bytes"),
        ]:
            self.assert_failed(self.returned(kind), logged)
        answer = self.returned("iterator-of-text-later", then="cut off")
        self.assertEqual((answer.status, answer.body, answer.whole), (200, b"one", False))
        self.assert_logged("is str, not bytes: 'two'")

    def test_of_many_bytes_arrives_whole(self):
        answer = self.ask("/large")
        self.assertEqual((len(answer.body), answer.framing), (3000000, "length"))


class Close(Clause):
    def closed(self, target, *others, then="kept", **keywords):
        answer = self.ask("%s?%s" % (target, self.key), then=then, **keywords)
        self.assertEqual(self.notes(1 + len(others)), [*others, "closed"])
        return answer

    def test_is_called_after_the_last_piece(self):
        self.assertEqual(self.closed("/close_normal").body, b"onetwo")

    def test_is_called_after_a_list(self):
        self.assertEqual(self.closed("/close_list").body, b"one")

    def test_is_called_after_an_answer_without_a_body(self):
        self.assertEqual(self.closed("/close_nothing").framing, "nothing")

    def test_is_called_after_head(self):
        answer = self.closed("/close_normal", method="HEAD")
        self.assertEqual((answer.status, answer.framing), (200, "nothing"))

    def test_is_called_after_an_error_wherever_it_comes(self):
        self.assertEqual(self.closed("/close_early").status, 500)

    def test_is_called_after_an_error_in_the_middle(self):
        self.assertFalse(self.closed("/close_middle", then="cut off").whole)

    def test_is_called_after_a_piece_that_is_no_bytes(self):
        self.assertEqual(self.closed("/close_text").status, 500)

    def test_is_called_after_a_status_that_is_none(self):
        self.assertEqual(self.closed("/close_status").status, 500)

    def test_is_called_when_the_length_is_reached_before_the_last_piece(self):
        self.assertEqual(self.closed("/close_complete").body, b"one")

    def test_is_called_for_a_file_that_is_wrapped(self):
        self.assertIn(b"def act_close_file", self.closed("/close_file").body)

    def test_may_fail_and_the_answer_stands(self):
        self.assertEqual(self.closed("/close_fails").body, b"one")
        self.assert_logged("ValueError: in close()")

    def test_is_called_when_the_client_leaves_an_answer_that_has_no_end(self):
        wire = self.wire()
        wire.request("/close_gone?" + self.key)
        wire.read_until(b"xxx")
        wire.reset()
        self.assertEqual(self.notes(1), ["closed"])

    def test_write_raises_once_the_client_has_left(self):
        wire = self.wire()
        wire.request("/write_gone?" + self.key)
        wire.read_until(b"xxx")
        wire.reset()
        self.assertEqual(len(self.notes(1)), 1)
        self.wire().ask("/hello")
        self.assertNotIn("Traceback", server.text[self.log_begins :])


class ContentLength(Clause):
    """Of the two things that an application says about a body, its length and the body, the body
    is believed where it is there as a whole, and the length where it is not.
    """

    def length(self, kind, told, **keywords):
        return self.ask("/length?%s,%s" % (kind, told), **keywords)

    def test_that_is_right_is_told(self):
        for kind in ("list", "iterator"):
            answer = self.length(kind, 10)
            self.assertEqual((answer.body, answer.framing), (b"1234567890", "length"))

    def test_that_is_wrong_is_corrected_for_a_list(self):
        for told in (3, 20):
            answer = self.length("list", told)
            self.assertEqual(answer.body, b"1234567890")

    def test_that_is_too_short_cuts_an_iterator_off(self):
        answer = self.length("iterator", 7)
        self.assertEqual((answer.body, answer.framing), (b"1234567", "length"))
        self.assert_logged("longer than its Content-Length")

    def test_that_is_too_long_for_an_iterator_ends_the_connection(self):
        answer = self.length("iterator", 20, then="cut off")
        self.assertEqual((answer.body, answer.whole), (b"1234567890", False))
        self.assert_logged("10 bytes shorter than its Content-Length")

    def test_that_is_no_number_is_not_told(self):
        for told in ("many", "-1", "1,1", ""):
            answer = self.length("list", told)
            self.assertEqual((answer.body, answer.framing), (b"1234567890", "length"))
            answer = self.length("iterator", told)
            self.assertEqual((answer.body, answer.framing), (b"1234567890", "chunks"))

    def test_is_told_for_head_without_a_body(self):
        for kind in ("list", "iterator"):
            head = self.length(kind, 10, method="HEAD")
            self.assertEqual((head.header("Content-Length"), head.body), ("10", b""))
        head = self.ask("/returned?list", "HEAD")
        self.assertEqual(head.header("Content-Length"), "6")
        self.assertIsNone(self.ask("/returned?generator", "HEAD").header("Content-Length"))

    def test_and_a_body_are_not_sent_with_204_and_304(self):
        for status in ("204 No Content", "304 Not Modified"):
            answer = self.ask("/status", fields=[("X-Status", status)])
            self.assertEqual(answer.framing, "nothing")
            if answer.status == 204:
                self.assertIsNone(answer.header("Content-Length"))


class TheFileWrapper(Clause):
    def setUp(self):
        super().setUp()
        file = tempfile.NamedTemporaryFile(prefix="file-")
        self.addCleanup(file.close)
        self.path, self.data = file.name, pattern(200000)
        file.write(self.data)
        file.flush()

    def wrapped(self, offset=0, told="", **keywords):
        return self.ask("/length_of_file?%s,%d,%s" % (self.path, offset, told), **keywords)

    def test_sends_a_file_with_its_length(self):
        answer = self.wrapped()
        self.assertEqual((answer.body == self.data, answer.framing), (True, "length"))
        head = self.wrapped(method="HEAD")
        self.assertEqual((head.header("Content-Length"), head.framing), ("200000", "nothing"))
        old = self.wrapped(version="1.0", then="closed")
        self.assertEqual((old.body == self.data, old.framing), (True, "length"))

    def test_sends_a_file_from_where_it_stands(self):
        self.assertTrue(self.wrapped(150001).body == self.data[150001:])
        self.assertEqual(self.wrapped(200000).body, b"")
        self.assertEqual(self.wrapped(300000).body, b"")

    def test_sends_no_more_of_a_file_than_its_content_length(self):
        self.assertTrue(self.wrapped(0, "100000").body == self.data[:100000])
        self.assertEqual(self.wrapped(10, "5").body, self.data[10:15])
        self.assertEqual(self.wrapped(0, "0").body, b"")

    def test_sends_a_file_that_is_shorter_than_its_content_length_as_it_is(self):
        self.assertEqual(self.wrapped(199990, "5000").body, self.data[199990:])

    def test_reads_what_is_no_file(self):
        data = b"0123456789" * 1000
        for kind, wanted in [
            ("memory", data),
            ("small-blocks", data),
            ("temporary", data[5:]),
            ("pipe", data),
            ("iterated", data.replace(b"0", b"-")),
        ]:
            self.assertEqual(self.ask("/wrapped?" + kind).body, wanted)

    def test_leaves_no_descriptor_behind(self):
        def descriptors():
            return {pid: len(os.listdir("/proc/%d/fd" % pid)) for pid in server.processes()}

        self.wrapped()
        before = descriptors()
        for _ in range(20):
            self.wrapped()
            self.wrapped(10, "5")
        eventually(
            lambda: sum(descriptors().values()) <= sum(before.values()), "descriptors are closed"
        )


class EarlyHints(Clause):
    LINKS = [("Link", "</a.css>; rel=preload; as=style"), ("Link", "</b.js>")]

    def test_go_before_the_answer(self):
        answer = self.ask("/hints")
        self.assertEqual((answer.status, answer.body), (200, b"final"))
        (early,) = answer.interim
        self.assertEqual((early.status, early.reason), (103, "Early Hints"))
        self.assertEqual(early.headers, self.LINKS)
        self.assertEqual(answer.values("Link"), [])

    def test_may_be_several_but_not_after_the_answer_has_begun(self):
        answer = self.ask("/hints_twice")
        self.assertEqual((answer.status, answer.body), (200, b"streamed, final"))
        links = [early.values("Link") for early in answer.interim]
        self.assertEqual(links, [["</a.css>"], ["</b.css>"]])

    def test_are_shown_by_curl(self):
        command = ["curl", "-sS", "-i", "--max-time", "30", server.url + "/hints"]
        shown = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.decode()
        self.assertRegex(shown, r"(?s)^HTTP/1.1 103 .*</b.js>.*\r\n\r\nHTTP/1.1 200 OK\r\n.*final$")

    def test_that_http_does_not_have_are_not_sent_and_the_answer_is(self):
        for kind in ("name", "nul", "space"):
            answer = self.ask("/hints_bad?" + kind)
            self.assertEqual((answer.interim, answer.body), ([], b"final"))

    def test_are_not_sent_to_an_http_1_0_client(self):
        answer = self.ask("/hints", version="1.0", then="closed")
        self.assertEqual((answer.interim, answer.body), ([], b"final"))
