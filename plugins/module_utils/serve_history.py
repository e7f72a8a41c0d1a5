"""The Serve configs that a head was given, newest last, each with how it went. They may hold secrets."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time

KEEP = 20
# `started`: nobody saw how it ended, as the run was killed.
STARTED, GOOD, FAILED = "started", "good", "failed"
TIME = "%Y-%m-%dT%H:%M:%SZ"
# They say how replicas are replaced, and nothing of what runs.
KNOBS = ("max_surge_percent", "rolling_update_percentage")


class History(object):
    """One file for each config: <number>.json, readable by its owner alone."""

    def __init__(self, folder):
        self.folder = folder

    def entries(self):
        """All that can be read, oldest first: number, time, why, outcome, message, digest, seconds, config."""
        try:
            names = sorted(name for name in os.listdir(self.folder) if re.fullmatch(r"\d{6,}\.json", name))
        except FileNotFoundError:
            return []
        found = []
        for name in names:
            try:
                with open(os.path.join(self.folder, name)) as handle:
                    found.append(json.load(handle))
            except ValueError:
                continue  # a disk that was full; the others count
        return sorted(found, key=lambda entry: entry["number"])

    def get(self, number):
        """The entry, or None."""
        return next((entry for entry in self.entries() if entry["number"] == number), None)

    def newest(self, outcome=None, other_than=None):
        """The newest entry, of an outcome and with another digest than this one, or None."""
        for entry in reversed(self.entries()):
            if outcome in (None, entry["outcome"]) and entry["digest"] != other_than:
                return entry
        return None

    def add(self, config, digest, why, outcome=STARTED):
        """Note a config; returns its entry."""
        newest = self.newest()
        entry = {
            "number": newest["number"] + 1 if newest else 1,
            "time": time.strftime(TIME, time.gmtime()),
            "why": why,
            "outcome": outcome,
            "message": "",
            "restored": None,
            "digest": digest,
            "seconds": {},
            "config": config,
        }
        self._write(entry)
        self._forget()
        return entry

    def end(self, entry, outcome, message="", seconds=None, restored=None):
        """Note how it went. seconds: by app, from the sending of the config until it ran."""
        entry.update(outcome=outcome, message=message, seconds=seconds or {}, restored=restored)
        self._write(entry)

    def seconds(self, app):
        """How long the app took to be replaced or started, the last time that it was seen; None where it never was."""
        known = [entry["seconds"][app] for entry in self.entries() if app in entry["seconds"]]
        return known[-1] if known else None

    def _write(self, entry):
        os.makedirs(self.folder, mode=0o700, exist_ok=True)
        path = os.path.join(self.folder, "%06d.json" % entry["number"])
        descriptor = os.open(path + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as handle:
            json.dump(entry, handle, indent=1, sort_keys=True)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(path + ".new", path)

    def _forget(self):
        """The oldest go; never the newest that was good."""
        entries = self.entries()
        good = self.newest(GOOD)
        for entry in entries[:-KEEP]:
            if good is None or entry["number"] != good["number"]:
                os.unlink(os.path.join(self.folder, "%06d.json" % entry["number"]))


def told(entry):
    """An entry without its config."""
    apps = sorted(app.get("name", "") for app in entry["config"].get("applications", []))
    return dict({key: value for key, value in entry.items() if key != "config"}, apps=apps)


def plain(app):
    """An app's config without what only says how replicas are replaced, or how many of them its scaler outside had."""
    if not isinstance(app, dict) or not app.get("deployments"):
        return app
    left = KNOBS + (("num_replicas",) if app.get("external_scaler_enabled") else ())
    deployments = [{key: item[key] for key in item if key not in left} for item in app["deployments"]]
    # One that says nothing else is not there.
    return dict(app, deployments=[item for item in deployments if set(item) != {"name"}])


def digest(applications, target_capacity=None):
    """What tells two configs apart. applications: by name, as Ray's schema sees them."""
    apps = {name: plain(app) for name, app in applications.items()}
    text = json.dumps({"applications": apps, "target_capacity": target_capacity}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
