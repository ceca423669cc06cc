import time, shutil, os
from contextlib import contextmanager
from tests.backup.cluster_installations import *
from tests.backup.cluster_installations import prepared_installation, running_installation
from tests.backup.promises import restore
from backend.services.restore_service import get_restore_service
import gc
@contextmanager
def timed(what):
    t=time.time(); yield; print(what, round(time.time()-t,2))

def test_x(monkeypatch):
    with timed("prep"): prepared_installation()
    with running_installation(monkeypatch) as i:
        with timed("verify"): print(get_backup_service().verify(i.backups[Kind.INCR], COMMAND_LINE).verified_at)
        i.site.cluster.ask("CREATE ROLE newone LOGIN PASSWORD 'secret-x-1'")
        for kind in Kind:
            with timed("restore "+kind):
                r=restore(i.backups[kind])
            print(hotels())
            rename("live")
        print(i.site.cluster.ask("SELECT rolname, rolcanlogin, rolsuper, rolpassword is null from pg_authid where rolname !~ '^pg_'"))
        with timed("dry"): print(restore(i.backups[Kind.FULL],dry_run=True).status, hotels())
        with timed("undo"):
            print(get_restore_service().undo(COMMAND_LINE,dry_run=False,confirm=True).status, hotels())
        os.system(f"find {i.site.folder}/data-holdfast")
    gc.collect()
