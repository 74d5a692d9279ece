"""What TLS is spoken with: a certificate and its key, as files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reconciler.core.errors import HostError
from reconciler.core.settings import Tls

if TYPE_CHECKING:
    import ssl


def context(tls: Tls) -> ssl.SSLContext:
    """What TLS is spoken with. Raises HostError."""
    import ssl

    found = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    found.minimum_version = ssl.TLSVersion.TLSv1_2
    load(found, tls)
    if tls.client_ca:
        try:
            found.load_verify_locations(cafile=tls.client_ca)
        except OSError as error:
            raise HostError(
                f"cannot use `api: {{tls: {{client_ca: {tls.client_ca}}}}}`: {_why(error)}"
            ) from error
        found.verify_mode = ssl.CERT_REQUIRED
    return found


def load(context: ssl.SSLContext, tls: Tls) -> None:
    """Have a context show this certificate from now on. Raises HostError."""

    def asked() -> str:  # else OpenSSL would ask at the terminal
        raise HostError(f"cannot use the key {tls.key}: it has a password; write one without")

    for path in (tls.cert, tls.key):  # OpenSSL does not say which of the two it could not read
        try:
            with open(path, "rb"):
                pass
        except OSError as error:
            raise HostError(f"cannot read {path} of `api: {{tls: …}}`: {_why(error)}") from error
    try:
        context.load_cert_chain(tls.cert, tls.key, asked)
    except OSError as error:
        raise HostError(
            f"cannot use the certificate {tls.cert} with the key {tls.key}: {_why(error)}"
        ) from error


def _why(error: OSError) -> str:
    """OpenSSL's words, or the kernel's."""
    return getattr(error, "reason", None) or error.strerror or str(error)
