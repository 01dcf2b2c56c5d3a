"""TLS over a real socket: whom the client believes, and what it says when it does not."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.fakes.master import FakeMaster, server_context
from worker.errors import ConfigError, MasterUnreachable, NodeUnknown
from worker.master.client import MasterClient


@dataclass(frozen=True)
class Files:
    ca: Path
    cert: Path
    key: Path


def write_leaf(ca: trustme.CA, folder: Path, name: str, *identities: str) -> Files:
    leaf = ca.issue_cert(*identities)
    files = Files(folder / "ca.pem", folder / f"{name}.pem", folder / f"{name}.key")
    ca.cert_pem.write_to_path(files.ca)
    leaf.cert_chain_pems[0].write_to_path(files.cert)
    leaf.private_key_pem.write_to_path(files.key)
    return files


def write_self_signed(folder: Path, name: str = "master", *, extended: bool = True) -> Files:
    """As the master makes its own, or without extensions: no CA, and signed with its own key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=365))
    )
    if extended:
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        addresses = [x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))]
        builder = (
            builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(x509.SubjectAlternativeName(addresses), critical=False)
        )
    files = Files(folder / "self.pem", folder / "self.pem", folder / "self.key")
    files.cert.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))
    files.key.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )  # fmt: skip
    return files


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return write_leaf(trustme.CA(), tmp_path, "server", "127.0.0.1", "localhost")


@pytest.fixture
def master(files: Files) -> Iterator[FakeMaster]:
    with FakeMaster(tls=server_context(files.cert, files.key)) as master:
        yield master


async def speak(client: MasterClient) -> None:
    """One request that the master must have understood."""
    async with client:
        with pytest.raises(NodeUnknown):
            await client.heartbeat("nobody")


async def fail(client: MasterClient) -> MasterUnreachable:
    async with client:
        with pytest.raises(MasterUnreachable) as caught:
            await client.heartbeat("nobody")
    return caught.value


async def test_a_known_authority_is_believed(master: FakeMaster, files: Files) -> None:
    await speak(MasterClient(base_url=master.url, ca=files.ca))


async def test_the_system_does_not_know_this_one(master: FakeMaster) -> None:
    error = await fail(MasterClient(base_url=master.url))
    assert not error.sent
    assert f"127.0.0.1:{master.port}" in str(error)
    assert "not trusted" in str(error)
    assert "--ca" in str(error)
    assert not master.requests


async def test_another_authority_is_not_believed(master: FakeMaster, tmp_path: Path) -> None:
    other = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(other)
    assert "--ca" in str(await fail(MasterClient(base_url=master.url, ca=other)))
    assert not master.requests


async def test_a_certificate_for_another_name(tmp_path: Path) -> None:
    files = write_leaf(trustme.CA(), tmp_path, "other", "other.example")
    with FakeMaster(tls=server_context(files.cert, files.key)) as master:
        error = await fail(MasterClient(base_url=master.url, ca=files.ca))
    assert "for another name" in str(error)


async def test_an_expired_certificate(tmp_path: Path) -> None:
    ca = trustme.CA()
    leaf = ca.issue_cert("127.0.0.1", not_after=datetime(2020, 1, 1, tzinfo=UTC))
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    leaf.private_key_and_cert_chain_pem.write_to_path(tmp_path / "both.pem")
    with FakeMaster(tls=server_context(tmp_path / "both.pem")) as master:
        error = await fail(MasterClient(base_url=master.url, ca=tmp_path / "ca.pem"))
    assert "out of date" in str(error)


async def test_a_certificate_of_the_future(tmp_path: Path) -> None:
    ca = trustme.CA()
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    leaf = ca.issue_cert("127.0.0.1", not_before=tomorrow, not_after=tomorrow + timedelta(days=1))
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    leaf.private_key_and_cert_chain_pem.write_to_path(tmp_path / "both.pem")
    with FakeMaster(tls=server_context(tmp_path / "both.pem")) as master:
        error = await fail(MasterClient(base_url=master.url, ca=tmp_path / "ca.pem"))
        assert not master.requests
    assert "out of date" in str(error)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST"])
async def test_loopback_is_no_exception(host: str, tmp_path: Path) -> None:
    files = write_leaf(trustme.CA(), tmp_path, "other", "other.example")
    with FakeMaster(tls=server_context(files.cert, files.key)) as master:
        url = f"https://{host}:{master.port}"
        for ca in (None, files.ca):
            error = await fail(MasterClient(base_url=url, api_key="s3cret-key", ca=ca))
            assert not error.sent
            assert "certificate is" in str(error)
        assert not master.requests


async def test_a_name_counts_only_where_certificates_have_names(tmp_path: Path) -> None:
    """One without them, but with the host as its common name, is for nobody."""
    files = write_self_signed(tmp_path, "localhost", extended=False)
    with FakeMaster(tls=server_context(files.cert, files.key)) as master:
        url = f"https://localhost:{master.port}"
        assert "for another name" in str(await fail(MasterClient(base_url=url, ca=files.cert)))
        assert not master.requests


async def test_a_self_signed_certificate_is_pinned(tmp_path: Path) -> None:
    files = write_self_signed(tmp_path)
    with FakeMaster(tls=server_context(files.cert, files.key)) as master:
        assert "--ca" in str(await fail(MasterClient(base_url=master.url)))
        await speak(MasterClient(base_url=master.url, ca=files.cert))


async def test_a_leaf_is_pinned_without_its_authority(master: FakeMaster, files: Files) -> None:
    await speak(MasterClient(base_url=master.url, ca=files.cert))


async def test_insecure_works_and_warns(
    master: FakeMaster, caplog: pytest.LogCaptureFixture
) -> None:
    client = MasterClient(base_url=master.url, insecure=True)
    await speak(client)
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "NOT verified" in warnings[0].getMessage()


async def test_client_certificates(tmp_path: Path) -> None:
    ca = trustme.CA()
    server = write_leaf(ca, tmp_path, "server", "127.0.0.1")
    ours = write_leaf(ca, tmp_path, "client", "worker.example")
    foreign_folder = tmp_path / "foreign"
    foreign_folder.mkdir()
    foreign = write_leaf(trustme.CA(), foreign_folder, "client", "worker.example")
    tls = server_context(server.cert, server.key, client_ca=server.ca)
    with FakeMaster(tls=tls) as master:
        await speak(
            MasterClient(base_url=master.url, ca=server.ca, cert=ours.cert, key=ours.key)
        )  # fmt: skip
        seen = len(master.requests)
        error = await fail(MasterClient(base_url=master.url, ca=server.ca))
        assert "set --cert and --key" in str(error)
        error = await fail(
            MasterClient(base_url=master.url, ca=server.ca, cert=foreign.cert, key=foreign.key)
        )
        assert "check --cert and --key" in str(error)
        assert len(master.requests) == seen


async def test_a_client_certificate_with_its_key_in_one_file(
    master: FakeMaster, tmp_path: Path, files: Files
) -> None:
    both = tmp_path / "both.pem"
    both.write_bytes(files.cert.read_bytes() + files.key.read_bytes())
    await speak(MasterClient(base_url=master.url, ca=files.ca, cert=both))


async def test_tls_1_1_is_refused(files: Files) -> None:
    context = server_context(files.cert, files.key)
    context.set_ciphers("DEFAULT@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        context.minimum_version = ssl.TLSVersion.TLSv1
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    with FakeMaster(tls=context) as master:
        error = await fail(MasterClient(base_url=master.url, ca=files.ca))
    assert "1.2 or newer" in str(error)


async def test_plain_http_to_a_tls_port(master: FakeMaster) -> None:
    error = await fail(MasterClient(base_url=master.url.replace("https", "http")))
    assert "MASTER_URL must begin with https://" in str(error)
    assert not error.sent


async def test_tls_to_a_plain_port() -> None:
    with FakeMaster() as master:
        error = await fail(MasterClient(base_url=master.url.replace("http", "https")))
    assert "http://" in str(error)
    assert not error.sent


@pytest.mark.parametrize("option", ["ca", "cert", "key"])
def test_a_file_that_is_not_there(option: str, files: Files, tmp_path: Path) -> None:
    paths = {"ca": files.ca, "cert": files.cert, "key": files.key}
    paths[option] = tmp_path / "nowhere.pem"
    with pytest.raises(ConfigError, match=rf"--{option} .*nowhere\.pem.*No such file"):
        MasterClient(base_url="https://box", **paths)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "no PEM", "-----BEGIN CERTIFICATE-----\n!!\n", "\xff\x00"])
@pytest.mark.parametrize("option", ["ca", "cert", "key"])
def test_a_file_that_is_no_pem(option: str, text: str, files: Files, tmp_path: Path) -> None:
    paths = {"ca": files.ca, "cert": files.cert, "key": files.key}
    paths[option] = tmp_path / "broken.pem"
    paths[option].write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"broken\.pem"):
        MasterClient(base_url="https://box", **paths)  # type: ignore[arg-type]


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Is a directory"):
        MasterClient(base_url="https://box", ca=tmp_path)


def test_names_in_a_bundle_need_not_be_ascii(files: Files, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle.pem"
    bundle.write_bytes("# Autorité\n".encode() + files.ca.read_bytes())
    MasterClient(base_url="https://box", ca=bundle)


def test_key_and_certificate_must_belong_together(files: Files, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    other = write_leaf(trustme.CA(), folder, "client", "x.example")
    with pytest.raises(ConfigError, match="does not belong"):
        MasterClient(base_url="https://box", cert=files.cert, key=other.key)
    with pytest.raises(ConfigError, match="set --cert"):
        MasterClient(base_url="https://box", key=files.key)


def test_an_encrypted_key_asks_nobody(files: Files, tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    locked = tmp_path / "locked.key"
    locked.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"pass"))
    )
    with pytest.raises(ConfigError, match=r"locked\.key.*without passphrase"):
        MasterClient(base_url="https://box", cert=files.cert, key=locked)


def test_tls_options_without_tls_are_pointed_out(
    files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    MasterClient(base_url="http://box", ca=files.ca)
    assert "no effect" in caplog.text


# Certificates that are renewed while the program runs


async def test_a_renewed_pinned_certificate_is_taken_up(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    new.mkdir()
    first, second = write_self_signed(old), write_self_signed(new)
    pinned = tmp_path / "pinned.pem"
    pinned.write_bytes(first.cert.read_bytes())
    with FakeMaster(tls=server_context(first.cert, first.key)) as master:
        port = master.port
        client = MasterClient(base_url=master.url, ca=pinned)
        with pytest.raises(NodeUnknown):
            await client.heartbeat("nobody")
    with FakeMaster(tls=server_context(second.cert, second.key), port=port):
        with pytest.raises(MasterUnreachable, match="not trusted"):
            await client.heartbeat("nobody")
        pinned.write_bytes(b"half a certif")
        with pytest.raises(MasterUnreachable):
            await client.heartbeat("nobody")
        pinned.write_bytes(second.cert.read_bytes())
        with pytest.raises(MasterUnreachable):  # which makes it look at its files
            await client.heartbeat("nobody")
        await speak(client)


async def test_a_renewed_client_certificate_is_taken_up(files: Files, tmp_path: Path) -> None:
    authority = trustme.CA()
    folder = tmp_path / "client"
    folder.mkdir()
    stranger = write_leaf(trustme.CA(), folder, "client", "worker")
    context = server_context(files.cert, files.key)
    authority.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    with FakeMaster(tls=context) as master:
        client = MasterClient(
            base_url=master.url, ca=files.ca, cert=stranger.cert, key=stranger.key
        )  # fmt: skip
        with pytest.raises(MasterUnreachable):
            await client.heartbeat("nobody")
        write_leaf(authority, folder, "client", "worker")
        with pytest.raises(MasterUnreachable):
            await client.heartbeat("nobody")
        await speak(client)
