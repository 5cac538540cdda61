"""The group that all verbs belong to, and what becomes of their errors: one line and an exit code."""

from __future__ import annotations

from typing import Any

import click

from xrdfast import __version__

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


class _Commands(click.Group):
    """Turns what users can get wrong into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # click ends quietly
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else "xrdfast"
            self._end(ctx, error, 2, f"{error.format_message()} (see {command} --help)")
        except (ValueError, OSError) as error:
            self._end(ctx, error, 2, _one_line(error))
        except ImportError as error:
            self._end(ctx, error, 2, f"{error.name}: package: must be installed, got {error}")
        except KeyboardInterrupt as error:
            self._end(ctx, error, INTERRUPTED, "interrupted; files that were finished before are whole")
        except RuntimeError as error:
            from xrdfast._native import BuildError

            if not isinstance(error, BuildError):
                raise
            self._end(ctx, error, 1, str(error))

    def _end(self, ctx: click.Context, error: BaseException, code: int, message: str) -> None:
        if ctx.params.get("debug"):
            raise error
        click.echo(f"xrdfast: error: {message}", err=True)
        ctx.exit(code)


def _one_line(error: ValueError | OSError) -> str:
    if isinstance(error, OSError) and error.strerror:
        # Files of the package's own come as InputError; without a name it is what the answer is written to.
        return f"{error.filename or 'standard output'}: file: must be accessible, got {error.strerror}"
    return " ".join(str(error).split())


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, hidden=True, envvar="XRDFAST_DEBUG", help="Show tracebacks.")
@click.version_option(__version__, message="%(version)s")
def cli(debug: bool) -> None:
    """Crystal symmetry from powder X-ray diffraction patterns."""
