"""Functions to be rewritten in the tests: every shape of source that matters."""

from __future__ import annotations

import functools
import sys

import torch

from mindiesd.patches import faults

SEEN: list = []


def build_noting(original, site):
    """A replacement that notes its operands and what the original makes of them."""

    def noting(*operands, **named):
        SEEN.append((operands, named))
        return original(*operands, **named)

    return noting


def build_locating(original, site):
    """A replacement that notes the line that calls it."""

    def locating(*operands):
        frame = sys._getframe(1)
        while frame.f_code.co_filename == faults.__file__:
            frame = frame.f_back
        SEEN.append(frame.f_lineno)
        return original(*operands)

    return locating


def build_tagged(original, site):
    """A replacement whose result can be told from the original's."""

    def tagged(*operands, **named):
        return original(*operands, **named) + 1000

    return tagged


def build_law(original, site):
    """A replacement as the families write them."""

    def gated(x, y, gate):
        if site.takes(None if y.dim() else "no dimensions"):
            return torch.addcmul(x, y, gate)
        return original(x, y, gate)

    return gated


def plain(x, y, gate=2.0, *, bias=0.5):
    """Keeps its defaults."""
    return (x + y * gate) - bias


def several_lines(x, y, gate):
    total = (
        x
        + y  # a comment
        * gate
    )
    return total


def joined(residual, y, gate):
    z = gate * y
    out = residual + z
    return out


def joined_live(residual, y, gate):
    z = gate * y
    out = residual + z
    return out - z


def joined_in_loop(residual, y, gate):
    z = y
    for _ in range(2):
        residual = residual - z
        z = gate * y
        residual = residual + z
    return residual


def joined_in_branch(residual, y, gate, flag):
    z = y
    if flag:
        z = gate * y
        residual = residual + z
    return residual - z


def joined_across(residual, y, gate, log):
    z = gate * y
    y = log(y)
    return residual + z, y


def joined_reassigned(residual, y, gate):
    z = gate * y
    gate = -gate
    out = residual + z
    return out, gate


def order(log):
    return log(1) + log(2) * log(3)


def order_turned(log):
    return log(1) * log(2) + log(3)


def failing(x, y, gate):
    # The error is in the next line but one.
    x = x + 0
    return x + y * gate


def failing_after(x, y, gate):
    x = x + y * gate
    return x.no_such_attribute


def rotated(x, table):
    def rotate(x_in, by):
        turned = x_in * by
        return turned - x_in

    first = rotate(x, table)
    second = rotate(first, by=table)
    return first, second


def uses_outer(x, table):
    def rotate(x_in):
        return x_in * table

    return rotate(x)


def comprehension(rows, gate):
    return [row + row * gate for row in rows]


def decorator(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs) * 2

    return wrapper


def hiding_decorator(function):
    holder = [function]

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return holder[0](*args, **kwargs)

    return wrapper


@decorator
@torch.no_grad()
def decorated(x, y, gate):
    return x + y * gate


@hiding_decorator
def hidden(x, y, gate):
    return x + y * gate


def make_closure(offset):
    def closed(x, y, gate):
        return x + y * gate + offset

    return closed


def run(x, y, log=None):
    z = x * 2
    # The three statements.
    w = x @ y
    w = torch.softmax(w, dim=-1)
    out = w @ z

    return out - y


def run_onto_itself(x, y):
    x = x @ y
    x = torch.softmax(x, dim=-1)
    x = x @ y
    return x


def run_in_loops(x, y):
    for _ in range(2):
        if x.sum() > -1e9:
            w = x @ y
            w = torch.softmax(w, dim=-1)
            x = w @ x
        for _ in range(2):
            w = y @ x
            w = torch.softmax(w, dim=-1)
            x = w @ y
    return x


def run_of_expressions(parts, y):
    w = parts[0] @ y
    w = torch.softmax(w, dim=-1)
    parts[1] = y
    w = parts[0] @ y
    w = torch.softmax(w, dim=-1)
    out = w @ parts[1]
    return out


def run_assigned_anew(x, y):
    w = y
    out = w + x
    w = x @ y
    w = torch.softmax(w, dim=-1)
    out = w @ out
    w = out - y
    return w


def run_read_later(x, y):
    w = x @ y
    w = torch.softmax(w, dim=-1)
    out = w @ x
    return out + w


def run_read_in_next_round(x, y):
    w = x
    for _ in range(2):
        y = y + w
        w = x @ y
        w = torch.softmax(w, dim=-1)
        x = w @ x
    return x


def run_deleted(x, y):
    w = x @ y
    w = torch.softmax(w, dim=-1)
    out = w @ x
    del w
    return out


def run_added_to(x, y):
    w = x @ y
    w = torch.softmax(w, dim=-1)
    out = w @ x
    w += 1
    return out


def run_captured(x, y):
    def weights():
        return w

    w = x @ y
    w = torch.softmax(w, dim=-1)
    out = w @ x
    return out + weights()


def run_global(x, y):
    global w
    w = x @ y
    w = torch.softmax(w, dim=-1)
    out = w @ x
    return out


def run_over_its_operand(x, y):
    x = x @ y
    x = torch.softmax(x, dim=-1)
    out = x @ x
    return out


def run_calling(x, log):
    w = x @ log(x)
    w = torch.softmax(w, dim=-1)
    out = w @ x
    return out


def run_of_attributes(x, y):
    x.w = x @ y
    x.w = torch.softmax(x.w, dim=-1)
    out = x.w @ x
    return out


def run_failing(x, y):
    # The error is in the softmax.
    w = x @ y
    w = torch.softmax(w, dim=-1)
    out = w @ x
    return out


class Base:
    def forward(self, x, y, gate):
        return x - y


class Derived(Base):
    __secret = 3

    def __init__(self):
        self.calls = 0

    def forward(self, x, y, gate):
        """Uses the class cell and a mangled name."""
        before = super().forward(x, y, gate)
        self.__count()
        return before - (x + y * gate) * self.__secret

    def __count(self):
        self.calls += 1


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, gate: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        y = self.linear(x) * scale
        y = gate * y
        x = x + y
        return x


def sunk_otherwise(residual, y, gate, flag):
    if flag:
        y = gate * y
    else:
        residual = residual - 1
        y = y - 1
    y = residual + y
    return y


def sunk_without_else(residual, y, gate, flag):
    if flag == 1:
        y = gate * y
    elif flag == 2:
        raise ValueError(flag)
    y = residual + y
    return y


def not_sunk(residual, y, gate, flag):
    if flag:
        y = gate * y
    residual = residual - 1
    y = residual + y
    return y


class Named(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(4, 4)
        self.second = torch.nn.Tanh()
        self.third = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = self.second(x)
        x = self.third(x)
        return x
