"""
Roles of a cluster as they are now, given to a restored one.

Roles, their passwords and who belongs to whom are the whole cluster's, and a physical restore
brings back old ones: who was shut out since could sign in again, and who has a new password could
not. So the restored cluster gets those of the live one before it takes its place.
"""

import re
import secrets
from typing import Final

from backend.backup.pgbackrest.cluster import Cluster
from backend.backup.pgbackrest.private_server import PrivateServer
from backend.backup.pgbackrest.programs import plain_environment
from backend.errors import UnavailableError

_CREATE: Final = re.compile(rb"^(CREATE ROLE .+;)$", re.MULTILINE)
# Role 10 is the one that `initdb` made: it stays what it is. Nobody can drop the others here, for
# they may own what the backup holds; without a password and a right to sign in they are names.
_SHUT_OUT_ALL: Final = b"""
DO $all$
DECLARE
    found record;
BEGIN
    FOR found IN
        SELECT r.rolname AS role, m.rolname AS member, g.rolname AS grantor
        FROM pg_auth_members a
        JOIN pg_roles r ON r.oid = a.roleid
        JOIN pg_roles m ON m.oid = a.member
        LEFT JOIN pg_roles g ON g.oid = a.grantor
        WHERE m.rolname !~ '^pg_'
    LOOP
        IF current_setting('server_version_num')::int < 160000 OR found.grantor IS NULL THEN
            EXECUTE format('REVOKE %I FROM %I', found.role, found.member);
        ELSE
            EXECUTE format('REVOKE %I FROM %I GRANTED BY %I CASCADE',
                           found.role, found.member, found.grantor);
        END IF;
    END LOOP;
    FOR found IN SELECT oid, rolname FROM pg_roles WHERE rolname !~ '^pg_' LOOP
        EXECUTE format('ALTER ROLE %I RESET ALL', found.rolname);
        IF found.oid <> 10 THEN
            EXECUTE format('ALTER ROLE %I NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION '
                           'NOBYPASSRLS NOLOGIN PASSWORD NULL', found.rolname);
        END IF;
    END LOOP;
END
$all$;
"""


def carry_over(cluster: Cluster, server: PrivateServer) -> None:
    """
    Give the restored cluster on *server* the roles that the live one has now.

    One that the live cluster does not have any more stays, without any right; but on a new machine
    roles of the backup that are not there yet stay as they were. The passwords' digests pass
    through a file that the owner of the cluster alone may read, and that is removed.

    Raises:
        UnavailableError: The live server does not run, or one of them refuses.
    """
    environment = plain_environment() | cluster.password_entry()
    live = cluster.postmaster()
    if live is None:
        raise UnavailableError(f"the server of {cluster.data} does not run")
    place = ["-h", live.socket_folder, "-p", live.port, "-U", cluster.superuser, "-w"]
    dumped = cluster.account.run(
        [cluster.program("pg_dumpall"), "--roles-only", *place], environment=environment
    )
    if dumped.code != 0:
        raise UnavailableError(f"the roles cannot be read: {dumped.said()}")
    is_same = cluster.system_id_of(server.data) == cluster.system_id
    words = _CREATE.sub(_create_if_missing, dumped.output)
    script = server.sockets / f"roles-{secrets.token_hex(4)}"
    cluster.account.write(script, (_SHUT_OUT_ALL if is_same else b"") + words)
    try:
        # Terse, for PostgreSQL would quote the statement that it cannot read.
        psql = [cluster.program("psql"), "-Xqw", "-v", "ON_ERROR_STOP=1", "-v", "VERBOSITY=terse"]
        private = ["-h", str(server.sockets), "-p", server.port, "-U", cluster.superuser]
        done = cluster.account.run([*psql, *private, "-d", "postgres", "-1", "-f", str(script)])
    finally:
        script.unlink()
    if done.code != 0:
        raise UnavailableError(f"the roles were not carried over: {done.said()}")


def _create_if_missing(found: "re.Match[bytes]") -> bytes:
    tag = f"$t{secrets.token_hex(8)}$".encode()
    return (
        b"DO " + tag + b" BEGIN " + found[1] + b" EXCEPTION WHEN duplicate_object THEN NULL; END "
        + tag + b";"
    )  # fmt: skip
