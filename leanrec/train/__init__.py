from leanrec.train.loop import train
from leanrec.train.row_adam import RowAdam
from leanrec.train.run import train_recommender, train_run
from leanrec.train.settings import TrainSettings
from leanrec.train.state import Progress

__all__ = ["Progress", "RowAdam", "TrainSettings", "train", "train_recommender", "train_run"]
