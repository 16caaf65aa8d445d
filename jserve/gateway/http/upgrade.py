"""HTTP/1.1 parsing in which an offer to upgrade the connection is ignored."""

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# Headers of the offer; `connection` loses the options that name them.
_OFFER = (b"upgrade", b"http2-settings")


class PlainHttpProtocol(HttpToolsProtocol):
    """Uvicorn's protocol, which answers a request with `Upgrade` as if the header were not there.

    RFC 9110, section 7.8: a server may ignore the offer. llhttp instead ends the request at its
    head, so that a body would be lost, or be read as the next request. So the head is parsed a
    second time without the offer, and the bytes after it are what its other headers say.
    """

    _offered = False  # whether the head that was read last makes an offer

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            self._offered = True
            return
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        if not self._offered:
            super().on_message_complete()

    def data_received(self, data: bytes) -> None:
        """Parses `data`; the requests that it completes begin to run."""
        self._unset_keepalive_if_required()
        try:
            self._feed(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            message = "Invalid HTTP request received."
            self.logger.warning(message)
            self.send_400_response(message)

    def _feed(self, data: bytes) -> None:
        rest = memoryview(data)
        while True:
            try:
                self.parser.feed_data(rest)
            except httptools.HttpParserUpgrade as error:
                if not self._offered:  # CONNECT: no tunnel is opened, and what follows is unknown
                    raise
                self._offered = False
                rest = rest[error.args[0] :]
                head = self._head_without_offer()
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
                self.parser.feed_data(head)
            else:
                return

    def _head_without_offer(self) -> bytes:
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        for name, value in self.headers:
            if name == b"connection":
                options = (option.strip() for option in value.split(b","))
                value = b", ".join(it for it in options if it.lower() not in _OFFER)
            if name not in _OFFER:
                lines.append(b"%b: %b" % (name, value))
        return b"\r\n".join([*lines, b"", b""])
