"""A W&B run without wandb."""

from types import SimpleNamespace


class FakeRun:
    """Merges and commits as wandb does, at the test's command."""

    id = "fake"
    offline = True
    disabled = False

    def __init__(self):
        self.rows, self.alerts, self.waiting = [], [], {}
        self.config = SimpleNamespace(update=lambda *args, **kwargs: None)
        self.before_log = lambda: None
        self._local_step = 0
        self._is_finished = False

    def define_metric(self, *args, **kwargs):
        pass

    def log(self, values, commit):
        self.before_log()
        self.waiting.update(values)

    def alert(self, title, text, level):
        self.before_log()
        self.alerts.append((title, text, level))

    def commit(self, late=False):
        self.rows.append(self.waiting)
        self.waiting = {}
        if not late:
            self.arrive()

    def arrive(self):
        self._local_step += 1
