"""
The embedded Postgres: start it, find it again, stop it with its last user.

Owns one cluster per data directory, below ``<data directory>/postgres``:

    cluster/     Postgres's own files; made in a temporary folder and renamed, so it is complete or absent
    run/         the socket; in /tmp when the path is too long for one or cannot be written in a URL
    server.log   what Postgres says
    start.lock   held by whoever starts or stops the server
    users.lock   held, shared, by every user for as long as it lives; the kernel lets go when a user is killed,
                 so a user list cannot go stale. Who gets it exclusively was the last and stops the server.

Postgres refuses to run as root: for root it runs as a system user, and where that user cannot reach the data directory or the
programs, both live below /var/lib/jobdaemon-postgres instead. Permissions of folders that we did not make are never changed.

Leaves the schema to :mod:`jobdaemon.schema`. Imports the standard library only, so that every command can afford it.
"""

from jobdaemon.embedded.account import binaries
from jobdaemon.embedded.sharing import EmbeddedPostgres

__all__ = ["EmbeddedPostgres", "binaries"]
