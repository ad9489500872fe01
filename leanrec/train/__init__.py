from leanrec.train.loop import Teacher, train
from leanrec.train.row_adam import RowAdam
from leanrec.train.run import train_recommender, train_run
from leanrec.train.settings import TrainSettings
from leanrec.train.state import Progress

__all__ = ["Progress", "RowAdam", "Teacher", "TrainSettings", "train", "train_recommender", "train_run"]
