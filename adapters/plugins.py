"""What other distributions bring, found by entry point. Loads nothing of theirs before it is asked for by its name.

Names come from the metadata of what is installed on this machine, and nothing else: settings, a command line or a peer
choose among them and can bring nothing new. ``gradcodec.plugins`` is a copy: libraries that know nothing of each other
have one each.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Collection, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

_LOG = logging.getLogger(__name__)


class PluginError(ValueError):
    """What a distribution brings cannot be used; the message names the distribution."""


class Plugins:
    """What is brought in one group of entry points."""

    def __init__(self, group: str, own: Callable[[], Collection[str]]) -> None:
        """``own``: the names that are not to be had, being ours."""
        self.group = group
        self._own = own
        self._added: dict[str, Any] = {}
        self._offers: dict[str, list[EntryPoint]] | None = None
        self._loaded: dict[str, Any] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """All that is brought, by name, whether it can be loaded or not."""
        return (*self._added, *self._offered())

    def load(self, name: str) -> Any:
        """What is brought under a name, imported now. Raises KeyError: nothing is; PluginError: it cannot be used."""
        if name in self._added:
            return self._added[name]
        if name not in self.names:
            raise KeyError(name)
        if name not in self._loaded:
            offers = self._offered()[name]
            if len(offers) > 1:
                raise PluginError(
                    f"{name!r} is offered by {' and by '.join(map(_whose, offers))}: uninstall all but one"
                )
            try:
                self._loaded[name] = offers[0].load()
            except Exception as error:  # it is another's code, which may raise anything
                raise PluginError(f"{name!r} of {_whose(offers[0])} cannot be loaded: {error!r}") from error
        return self._loaded[name]

    def refusal(self, name: str, options: Mapping[str, Any], one: str, many: str) -> str:
        """Why settings with this name and these options cannot be served, beginning with their key; empty: they can.

        Args:
            one: what they are of, as ``task``; the group's name in front of keys, too.
            many: its plural.
        """
        if name in self._own():
            return f"{one}.options.{min(options)}: the {one} {name} has no options" if options else ""
        try:
            wrong = misfit(self.load(name), options)
        except KeyError:
            known = ", ".join((*self._own(), *self.names))
            return f"{one}.name={name!r} is none of {known}, the {many} that are installed here"
        except PluginError as error:
            return f"{one}.name: {error}"
        return f"{one}.options.{wrong}" if wrong else ""

    def add(self, name: str, what: Any) -> None:
        """Brings something in this process alone, as in a notebook. Raises PluginError: the name is taken."""
        if name in self._own():
            raise PluginError(f"{name!r} is taken: there is one of ours")
        if name in self.names:
            raise PluginError(f"{name!r} is taken: {self.origin(name)} has it")
        self._added[name] = what

    def remove(self, name: str) -> None:
        """Inverse of ``add``. Raises KeyError: it was not added here."""
        del self._added[name]

    def origin(self, name: str) -> str:
        """Who brings it, version and all: equal texts, equal code. Raises KeyError: nobody does."""
        if name in self._added:
            return f"this process ({self._added[name]!r})"
        return " and ".join(f"{_whose(offer)} ({offer.value})" for offer in self._offered()[name])

    def look_again(self) -> None:
        """Forgets what was found: something may have been installed since."""
        self._offers, self._loaded = None, {}

    def _offered(self) -> dict[str, list[EntryPoint]]:
        if self._offers is None:
            self._offers = {}
            for offer in entry_points(group=self.group):
                if offer.name in self._own():
                    _LOG.warning(
                        "%s: %r of %s is left out: there is one of ours", self.group, offer.name, _whose(offer)
                    )
                else:
                    self._offers.setdefault(offer.name, []).append(offer)
        return self._offers


def misfit(function: Callable[..., Any], options: Mapping[str, Any]) -> str:
    """What of the options a function does not take by name, as ``<option>: why``; empty: it takes all."""
    parameters = inspect.signature(function).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY or p.default is not p.empty]
    unknown = sorted(options.keys() - set(known))
    if not unknown or any(p.kind is p.VAR_KEYWORD for p in parameters):
        return ""
    return f"{unknown[0]}: there is no such option, but {', '.join(known) or 'none'}"


def _whose(offer: EntryPoint) -> str:
    return (
        "an unknown distribution" if offer.dist is None else f"the distribution {offer.dist.name} {offer.dist.version}"
    )
