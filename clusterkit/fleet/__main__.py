"""`python -m clusterkit.fleet --config PATH`: the daemon, in the foreground; it talks on stderr."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys

from clusterkit.errors import ClusterkitError
from clusterkit.fleet.config import read_config
from clusterkit.fleet.daemon import Fleet
from clusterkit.fleet.server import Server


async def serve(path: str) -> None:
    config = read_config(path)
    fleet = Fleet(config)
    server = Server(fleet)
    fleet.prepare()
    listening = await server.listen()
    work = asyncio.create_task(fleet.run())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, work.cancel)
    _tell_systemd("READY=1")
    logging.info("%d hosts in %d pools; socket %s", len(config.hosts), len(config.pools), config.socket)
    try:
        await work
    except asyncio.CancelledError:
        logging.info("asked to end; what is under way goes on with the next start")
    finally:
        listening.close()


def _tell_systemd(message: str) -> None:
    """sd_notify(3); nothing where nobody listens."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(message.encode(), "\0" + address[1:] if address.startswith("@") else address)


def main() -> int:
    parser = argparse.ArgumentParser(prog="clusterkit.fleet", description="Start, drain, stop and power workers.")
    parser.add_argument("--config", default="/etc/clusterkit/fleet.json", metavar="PATH")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        asyncio.run(serve(given.config))
    except ClusterkitError as error:
        logging.error("%s%s", error, f" ({error.hint})" if error.hint else "")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
