"""MLflow's default store: the file ``mlflow.db`` beside the folder of a command, with ``mlartifacts`` beside it."""

from __future__ import annotations

import hashlib
import platform
import sqlite3
from contextlib import closing
from pathlib import Path

from covray.errors import ConfigError
from covray.io import storage

STORE_FILE = "mlflow.db"
ARTEFACTS = "mlartifacts"


def beside(out: str) -> Path:
    """Return the folder that holds the local folder ``out``."""
    return Path(storage.resolve(out)[1]).parent


def folder_token(out: str) -> str:
    """Return what tells the folder of a command apart in a store that many machines share, in hexadecimal digits."""
    place = storage.absolute(out)
    if "://" not in out:
        place = f"{platform.node()}:{place}"  # two machines may have local folders of one name
    return hashlib.sha256(place.encode()).hexdigest()[:32]


def file_store(path: Path) -> str:
    """Return the address of the SQLite file at ``path``, an absolute path with any characters.

    Raises:
        ConfigError: The installed SQLAlchemy has no way to write the path.
    """
    if not {"%", "?"} & set(str(path)):
        return f"sqlite:///{path}"
    from sqlalchemy import make_url

    # SQLAlchemy takes what follows a ? for options, and from 2.1 on decodes %. With the driver's name MLflow leaves the
    # address as it is; without it, it makes a folder of the encoded name.
    escaped = str(path).replace("%", "%25").replace("?", "%3F")
    for text in (escaped, str(path)):
        uri = f"sqlite+pysqlite:///{text}"
        if make_url(uri).database == str(path):
            return uri
    raise ConfigError(f"{path.parent}: MLflow cannot open a file in a folder of this name; give --tracking-uri")


def file_of(uri: str) -> Path | None:
    """Return the path of the SQLite file that ``uri`` is the address of; None for other stores."""
    if not uri.startswith(("sqlite:///", "sqlite+pysqlite:///")):
        return None
    from sqlalchemy import make_url

    database = make_url(uri).database
    if not database:  # in memory
        return None
    return Path(database)


def move_artefacts(folder: Path) -> None:
    """Let the store in ``folder`` look for artefacts in ``folder``, if it was moved there with its runs.

    MLflow keeps absolute addresses, and offers no way to change them: its tables are changed directly.

    Raises:
        OSError: The file cannot be opened.
    """
    here = (folder / ARTEFACTS).as_uri()
    try:
        with closing(sqlite3.connect(folder / STORE_FILE)) as store, store:
            query = "SELECT DISTINCT artifact_location FROM experiments WHERE artifact_location LIKE ?"
            for (there,) in store.execute(query, (f"file://%/{ARTEFACTS}",)).fetchall():
                if there == here:
                    continue
                store.execute("UPDATE experiments SET artifact_location = ? WHERE artifact_location = ?", (here, there))
                store.execute(
                    "UPDATE runs SET artifact_uri = ? || substr(artifact_uri, ?) WHERE substr(artifact_uri, 1, ?) = ?",
                    (here, len(there) + 1, len(there) + 1, f"{there}/"),
                )
    except sqlite3.Error as error:
        raise OSError(f"{folder / STORE_FILE}: {error}") from error
