"""Losses of MoCo, BYOL and DINO against lightly's, and the moving average against a plain loop."""
import math

import pytest
import torch
import torch.nn.functional as F
from lightly.loss import DINOLoss, NegativeCosineSimilarity, NTXentLoss

from galaxy_ssl.byol import cosine_loss
from galaxy_ssl.dino import distillation_loss
from galaxy_ssl.moco import info_nce
from galaxy_ssl.teacher import EMA


def units(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


@pytest.mark.parametrize('temperature', [0.07, 0.2])
def test_queue_loss_is_that_of_lightly(temperature):
    torch.manual_seed(0)
    query, key = units(6, 16), units(6, 16)
    theirs = NTXentLoss(temperature, memory_bank_size=(32, 16))
    queue = theirs.memory_bank.bank.clone()
    ours = torch.stack([info_nce(query[i:i+1], key[i:i+1], torch.tensor([0]), temperature, queue)[0] for i in range(6)]).mean()
    torch.testing.assert_close(ours, theirs(query, key), atol=1e-5, rtol=0)


def test_byol_loss_is_that_of_lightly():
    torch.manual_seed(0)
    p, z = torch.randn(7, 9), torch.randn(7, 9)
    torch.testing.assert_close(cosine_loss(p, z), 2 + 2*NegativeCosineSimilarity()(p, z), atol=1e-5, rtol=0)


@pytest.mark.parametrize('n_local', [0, 3])
def test_dino_loss_is_that_of_lightly(n_local):
    torch.manual_seed(0)
    student, teacher = torch.randn(2 + n_local, 5, 11), torch.randn(2, 5, 11)
    theirs = DINOLoss(11, teacher_temp=0.05, student_temp=0.1)
    theirs.center.data = torch.randn(1, 1, 11)
    center = theirs.center.flatten().clone()
    ours = distillation_loss(student, teacher, center, 0.1, 0.05)[0]
    torch.testing.assert_close(ours, theirs(list(teacher), list(student)), atol=1e-5, rtol=0)


def test_a_teacher_is_the_plain_average():
    torch.manual_seed(0)
    student = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    teacher = EMA(student, momentum=0.9)
    plain = {k: v.clone() for k, v in student.state_dict().items() if v.is_floating_point()}
    for step in range(1, 21):
        with torch.no_grad():
            for p in student.parameters():
                p += torch.randn_like(p)
            student(torch.randn(8, 3))
        teacher.update(student, step, 20)
        m = 1 - 0.1*(math.cos(math.pi*step/20) + 1)/2
        plain = {k: m*v + (1 - m)*student.state_dict()[k] for k, v in plain.items()}
    for k, v in plain.items():
        torch.testing.assert_close(teacher.net.state_dict()[k], v, atol=1e-5, rtol=0)
