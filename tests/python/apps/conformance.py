"""Answers with what it was given, in the same JSON as builtin:echo: the HTTP cases are run against this, too."""

import json

FIELDS = {"CONTENT_TYPE": "content-type", "CONTENT_LENGTH": "content-length"}


def app(environ, start_response):
    body = environ["wsgi.input"].read()
    headers = [[key[5:].replace("_", "-").lower(), value] for key, value in environ.items() if key.startswith("HTTP_")]
    headers += [[name, environ[key]] for key, name in FIELDS.items() if environ.get(key)]
    answer = {
        "method": environ["REQUEST_METHOD"],
        "target": environ["RAW_URI"],
        "path": environ["PATH_INFO"],
        "query": environ.get("QUERY_STRING", ""),
        "version": environ["SERVER_PROTOCOL"],
        "headers": headers,
        "body": body.decode("latin-1"),
    }
    data = json.dumps(answer).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(data)))])
    return [data]
