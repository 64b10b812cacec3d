"""A model's chat template: the frame it draws around texts, which tokens that frame is made of, and where a turn ends.

What a template does is found by rendering it with placeholders for the texts, never by reading its source: templates are
programs, and the same frame is written in many ways.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property

from conj import InputError
from conj.data.files import first_line

PLACEHOLDER = re.compile(r"conj(\d+)placeholder")
# Llama 3.2's template asks for the day's date. Prompts that change overnight would be other prompts than those of the
# stored logprobs and the audit; this is the date that Llama 3.1's and 3.2's templates name where they cannot ask.
PROMPT_DATE = datetime(2024, 7, 26)


def placeholder(i: int) -> str:
    return f"conj{i}placeholder"


def fixed_date(date_format: str) -> str:
    """What a template gets that asks `strftime_now`: the same on every day."""
    return PROMPT_DATE.strftime(date_format)


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Whatever a library raises on a malformed file becomes an InputError; a panic of its Rust code is no Exception."""
    try:
        yield
    except InputError:
        raise
    except BaseException as e:
        if isinstance(e, Exception) or type(e).__name__ == "PanicException":
            raise InputError(f"{what}: {first_line(e)}") from None
        raise


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A template with the names that it may use; `where` is the model folder, for messages."""

    source: str
    bos: str | None
    eos: str | None
    others: dict[str, str]  # of other tokens that tokenizer_config.json names and the template may draw: {name: token}
    where: str

    def render(self, messages: list[dict], *, asks: bool = True) -> str:
        """The filled template, up to where the assistant starts to write if `asks`. Raises InputError if it refuses."""
        from transformers.utils.chat_template_utils import render_jinja_template  # seconds to import

        names = self.others | {"bos_token": self.bos, "eos_token": self.eos}
        names = {name: token for name, token in names.items() if token is not None} | {"strftime_now": fixed_date}
        settings = {"chat_template": self.source, "add_generation_prompt": asks, **names}
        with refusing(f"{self.where}: the chat template cannot be rendered"):
            return render_jinja_template(conversations=[messages], **settings)[0][0]

    def _rendered(self, *texts: tuple[str, str], asks: bool = True) -> str | None:
        """With these (role, content); None where the template refuses them."""
        try:
            return self.render([{"role": role, "content": content} for role, content in texts], asks=asks)
        except InputError:
            return None

    @cached_property
    def takes_system(self) -> bool:
        """False if the template refuses the empty system message of a judge's prompt, and takes the user's alone."""
        user = ("user", placeholder(1))
        return self._rendered(("system", ""), user) is not None or self._rendered(user) is None

    def prompts(self) -> list[str]:
        """Renderings of a judge's prompt: with the empty system message, or none, and with one that says something."""
        user, system = ("user", placeholder(1)), ("system", "")
        shown = [self._rendered(system, user), self._rendered(("system", placeholder(0)), user)]
        return [text for text in (shown if self.takes_system else [self._rendered(user)]) if text is not None]

    def after_turn(self) -> str:
        """What the template draws after the assistant's text; nothing where it draws no such turn."""
        turns = ("user", placeholder(1)), ("assistant", placeholder(2))
        shown = self._rendered(*([("system", "")] if self.takes_system else []), *turns, asks=False)
        return (shown or "").partition(placeholder(2))[2]
