"""Tests of suites: built-in recipes, inheritance, validation, scaling and hashing."""

import pytest
from pydantic import ValidationError

from kdbench.errors import UserError
from kdbench.suite.load import all_suites, load_suite, suite_files
from kdbench.suite.sections import Augmentation, OptimizerRecipe, Schedule
from kdbench.suite.suite import Suite

DIGESTS = {
    "digits": "dc9c2e32fd69187a",
    "cifar100": "e89afa0ed8fcfff0",
    "cifar100-reduced": "26c45825df7ba0dc",
    "imagenet": "44715ebf6d2ce071",
    "imagenet-reduced": "5b1d2459dc09637c",
}
# Every field that can change a number, and another value for it.
HASHED = {
    "networks": "2",
    "batch_size": "32",
    "evaluation_batch_size": "100",
    "evaluate_every": "2",
    "precision": '"bf16"',
    "data.name": '"other"',
    "data.classes": "9",
    "data.image_size": "16",
    "data.train.split": '"validation"',
    "data.train.images": "1400",
    "data.train.sha256": f'"{"0" * 64}"',
    "data.train.per_class": "7",
    "data.test.split": '"validation"',
    "data.test.images": "300",
    "data.test.sha256": f'"{"0" * 64}"',
    "data.test.per_class": "7",
    "augmentation.padding": "2",
    "augmentation.horizontal_flip": "true",
    "augmentation.mean": "[0.3054, 0.3054, 0.3]",
    "augmentation.std": "[0.3760, 0.3760, 0.3]",
    "optimizer.learning_rate": "0.06",
    "optimizer.momentum": "0.8",
    "optimizer.nesterov": "false",
    "optimizer.weight_decay": "5e-4",
    "schedule.epochs": "13",
    "schedule.milestones": "[5, 6]",
    "schedule.gamma": "0.2",
    "schedule.warmup_epochs": "0",
}
# The same of suites of encoded images.
CROP = "augmentation.random_resized_crop"
HASHED_ENCODED = {
    "data.resize": "30",
    "data.class_stride": "2",
    f"{CROP}.scale": "[0.25, 1]",
    f"{CROP}.ratio": "[0.5, 2]",
}
ENCODED = """
extends = "imagenet-reduced"
batch_size = 16
data.classes = 10
data.class_stride = 1
data.image_size = 8
data.resize = 9
data.train = { images = 1000, per_class = 50 }
data.test = { images = 500, per_class = 30 }
"""
# Every field that says what is offered, what it is called or where the images lie.
INERT = {
    "description": '"other"',
    "architectures": '["resnet8"]',
    "default_architecture": '"resnet20"',
    "seeds": "5",
    "data.hub": '"nobody/nothing"',
    "data.torchvision": '"CIFAR100"',
    "data.embedded": '"other"',
    "data.image_column": '"img"',
    "data.label_column": '"fine_label"',
}


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a suite file and returns its path."""

    def save(text: str | bytes, name: str = "mine") -> str:
        file = tmp_path / f"{name}.toml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(file)

    save(ENCODED, "encoded")
    return save


def complaint(name: str) -> str:
    """Return the message of the UserError after checking that it is one sentence."""
    with pytest.raises(UserError) as caught:
        load_suite(name)
    message = str(caught.value)
    assert "\n" not in message
    assert message[-1] in ".?" and message[-2] not in ".?"
    return message


def leaves(values: dict, prefix: str = "") -> dict[str, object]:
    found = {}
    for key, value in values.items():
        nested = isinstance(value, dict)
        found |= leaves(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return found


def counts(suite: Suite) -> list[int]:
    return [suite.data.count(split) for split in (suite.data.train, suite.data.test)]


def test_cifar100_is_the_published_recipe_of_ffsd():
    suite = load_suite("cifar100")
    assert (suite.batch_size, suite.networks, suite.precision) == (128, 3, "fp32")
    assert suite.schedule == Schedule(epochs=300, milestones=(150, 225), gamma=0.1, warmup_epochs=0)
    assert suite.optimizer == OptimizerRecipe(
        learning_rate=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    mean, std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    assert suite.augmentation == Augmentation(padding=4, horizontal_flip=True, mean=mean, std=std)
    assert (suite.data.classes, suite.data.image_size, counts(suite)) == (100, 32, [50_000, 10_000])
    assert (suite.steps_per_epoch, suite.total_steps) == (390, 117_000)


def test_imagenet_is_the_published_recipe():
    suite = load_suite("imagenet")
    assert suite.batch_size == 256 and suite.architectures == ("resnet18", "resnet34")
    milestones = (30, 60, 80)
    assert suite.schedule == Schedule(epochs=90, milestones=milestones, gamma=0.1, warmup_epochs=5)
    assert suite.optimizer.learning_rate == 0.1 and suite.optimizer.weight_decay == 1e-4
    crop = suite.augmentation.random_resized_crop
    assert crop.scale == (0.08, 1) and crop.ratio == pytest.approx((3 / 4, 4 / 3))
    assert suite.augmentation.horizontal_flip and suite.augmentation.padding is None
    assert (suite.data.image_size, suite.data.resize, suite.data.classes) == (224, 256, 1000)
    assert (suite.data.train.images, suite.data.test.images) == (1_281_167, 50_000)
    assert (suite.steps_per_epoch, suite.total_steps) == (5004, 450_360)


@pytest.mark.parametrize(("name", "digest"), DIGESTS.items())
def test_the_hashes_of_built_in_suites_do_not_change(name, digest):
    """A change of these hashes makes all stored results of the suite stale."""
    assert load_suite(name).digest() == digest


def test_all_built_in_suites_load_under_their_file_names():
    assert DIGESTS.keys() <= suite_files().keys()
    assert [suite.name for suite in all_suites()] == list(suite_files())
    assert len({suite.digest() for suite in all_suites()}) == len(suite_files())


@pytest.mark.parametrize(
    ("name", "epochs", "images", "pixels", "shrunk"),
    [
        ("cifar100", 10, [4_000, 2_000], (32, None), "architectures"),
        (
            "imagenet",
            30,
            [30_000, 5_000],
            (112, 128),
            "schedule.warmup_epochs data.classes data.class_stride data.image_size data.resize",
        ),
    ],
)
def test_reduced_suites_have_fewer_epochs_and_less_data_only(name, epochs, images, pixels, shrunk):
    full, reduced = load_suite(name), load_suite(f"{name}-reduced")
    assert reduced.schedule == full.schedule.scaled(epochs)
    assert reduced.data.classes * reduced.data.class_stride == full.data.classes
    assert (counts(reduced), (reduced.data.image_size, reduced.data.resize)) == (images, pixels)
    before, after = leaves(full.model_dump()), leaves(reduced.model_dump())
    always = {"name", "description", "schedule.epochs", "schedule.milestones"}
    always |= {"data.train.per_class", "data.test.per_class"}
    assert {key for key in before if before[key] != after[key]} == always | {*shrunk.split()}


def test_extends_overlays_single_settings_over_several_files(write):
    write('extends = "digits"\nseeds = 4\n[optimizer]\nlearning_rate = 1\n', "base")
    digits = load_suite("digits")
    optimizer = digits.optimizer.model_copy(update={"learning_rate": 1.0, "momentum": 0.5})
    expected = digits.model_copy(update={"name": "mine", "seeds": 4, "optimizer": optimizer})
    assert load_suite(write('extends = "base"\n[optimizer]\nmomentum = 0.5\n')) == expected


@pytest.mark.parametrize("parent", ["sub/base", "sub/base.toml", "../{here}/sub/base"])
def test_extends_finds_a_file_in_the_same_folder(write, tmp_path, parent):
    (tmp_path / "sub").mkdir()
    write('extends = "digits"\nseeds = 4', "sub/base")
    assert load_suite(write(f'extends = "{parent.format(here=tmp_path.name)}"')).seeds == 4


@pytest.mark.parametrize(
    ("wrong", "right"), [("cifar10", "cifar100"), ("digit", "digits"), ("reduced", None)]
)
def test_an_unknown_suite_suggests_the_nearest_and_lists_all(wrong, right):
    message = complaint(wrong)
    assert f"Unknown suite '{wrong}'" in message
    assert (f"Did you mean '{right}'?" in message) == (right is not None)
    assert all(name in message for name in DIGESTS)


@pytest.mark.parametrize(
    ("base", "text", "words"),
    [
        ("digits", "batchsize = 64", ["unknown key 'batchsize'", "'batch_size'"]),
        ("digits", "schedule.zzz = 3", ["unknown key 'schedule.zzz'", "known: epochs, milestones"]),
        ("digits", "[schedule]\nmilestons = [3]", ["'schedule.milestons'", "'milestones'"]),
        ("digits", "[data.train]\nper_clas = 3", ["'data.train.per_clas'", "'per_class'"]),
        ("digits", "[optimiser]\nmomentum = 0.9", ["unknown key 'optimiser'", "'optimizer'"]),
        ("digits", "epochs = 2", ["unknown key 'epochs'", "it belongs in 'schedule'"]),
        ("digits", "per_class = 2", ["'per_class'", "belongs in 'data.train' or 'data.test'"]),
        ("encoded", "data.resize = 4\ndata.classes = 99", ["a resize", "per_class times"]),
        ("encoded", "data.resize = 4", ["a resize that is no less than image_size"]),
        ("encoded", 'data.embedded = "digits"', ["no torchvision, embedded or sha256"]),
        ("encoded", "data.encoded = false", ["resize and class_stride are for encoded images"]),
        ("encoded", "augmentation.padding = 1", ["random_resized_crop, not padding"]),
        ("encoded", f"{CROP}.scale = [0.5, 0.1]", ["two increasing shares"]),
        ("encoded", f"{CROP}.ratio = [0, 1]", ["two increasing positive"]),
    ],
)
def test_unknown_keys_and_contradictory_settings_are_refused(write, base, text, words):
    message = complaint(write(f'extends = "{base}"\n{text}'))
    assert ("unknown key" in message) == (base == "digits")
    assert all(word in message for word in words), message


def test_all_errors_are_reported_at_once_with_their_keys(write):
    text = 'extends = "digits"\nseeds = 0\nbatchsize = 1\n[schedule]\nepochs = "3"\n[data.test]\n'
    message = complaint(write(f"{text}images = -1\n[augmentation]\nmean = [0.5, 0.5]"))
    for key in ("seeds", "batchsize", "schedule.epochs", "data.test.images", "augmentation.mean"):
        assert key in message
    missing = complaint(write("version = 1", "short"))
    assert all(f"'{key}' is missing" in missing for key in ("batch_size", "data", "schedule"))


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("schedule.epochs", ["0", "-3", "1.5", '"3"', "true", "nan"]),
        ("schedule.milestones", ["[9, 6]", "[6, 6]", "[6, 12]", "[0, 6]", "[nan]", "6", '["6"]']),
        ("schedule.gamma", ["0", "1.1", "nan", "inf"]),
        ("schedule.warmup_epochs", ["-1", "12", "nan"]),
        ("optimizer.learning_rate", ["0", "-0.1", "nan", "inf", '"0.1"', "true", "[0.1]"]),
        ("optimizer.momentum", ["-0.1", "1.5"]),
        ("optimizer.nesterov", ['"no"', "1"]),
        ("optimizer.weight_decay", ["-1e-4"]),
        ("augmentation.padding", ["-1", "8", "1.0"]),
        ("augmentation.horizontal_flip", ['"false"', "0"]),
        ("augmentation.mean", ["[0.5, 0.5]", "0.5", "[0.5, 0.5, nan]"]),
        ("augmentation.std", ["[0, 1, 1]", "[-1, 1, 1]"]),
        ("data.train.per_class", ["0", "144"]),
        ("data.train.sha256", ['"abc"']),
        ("data.torchvision", ['"MNIST"']),
        ("batch_size", ["0", "1438", "64.0"]),
        ("evaluation_batch_size", ["0"]),
        ("networks", ["0", "9"]),
        ("seeds", ["0"]),
        ("precision", ['"fp16"', "16"]),
        ("version", ["2"]),
        ("architectures", ["[]", '"resnet8"', "[8]"]),
        ("default_architecture", ['"resnet9"']),
        ("data", ['"cifar100"', "[]"]),
        ("name", ['"cifar100"', '"../../etc"']),
        ("extends", ["3", '""', '"mine"', '"digts"', '"../gone"', '"/gone.toml"']),
    ],
)
def test_a_wrong_value_gives_one_sentence(write, key, values):
    for value in values:
        inherited = "" if key == "extends" else 'extends = "digits"\n'
        message = complaint(write(f"{inherited}{key} = {value}"))
        assert message.startswith("Suite 'mine.toml' ")
        assert key.split(".")[0] in message


def test_circular_extends_is_refused(write, tmp_path):
    write('extends = "mine"', "other")
    around = write(f'extends = "../{tmp_path.name}/roundabout"', "roundabout")
    for circle in (write('extends = "other"'), around):
        assert "extends itself" in complaint(circle)
    assert "must not contain '@'" in complaint(write('extends = "digits"', "a@b"))


@pytest.mark.parametrize(
    "content",
    ["a = [", "= 3", "a = 1\na = 2", b"\xff\xfe", "a = " + "[" * 5000, "a = " + "9" * 5000],
)
def test_a_file_that_is_not_toml_is_refused(write, content):
    assert "'mine.toml' is not valid TOML" in complaint(write(content))


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "folder.toml").mkdir()
    for name in ("gone", "folder"):
        assert "does not exist" in complaint(str(tmp_path / f"{name}.toml"))
    assert "cannot be read" in complaint("x" * 300 + ".toml")


def test_with_epochs_scales_milestones_and_warm_up_and_renames():
    digits = load_suite("digits")
    half = digits.with_epochs(4)
    scaled = {"epochs": 4, "milestones": (2.0, 3.0), "warmup_epochs": 0.5}
    schedule = digits.schedule.model_copy(update=scaled)
    assert half == digits.model_copy(update={"name": "digits@epochs=4", "schedule": schedule})
    assert half.digest() != digits.digest()
    assert digits.schedule.epochs == 8 and digits.with_epochs(8) == digits
    assert digits.with_epochs(1).schedule.milestones == (0.5, 0.75)
    for epochs in (0, -1):
        with pytest.raises(UserError, match=f"at least 1, got {epochs}"):
            digits.with_epochs(epochs)


@pytest.mark.parametrize(("key", "value"), (HASHED | HASHED_ENCODED | INERT).items())
def test_the_hash_changes_with_settings_that_change_numbers(write, key, value):
    base = f'extends = "{"encoded" if key in HASHED_ENCODED else "digits"}"\n'
    plain, changed = load_suite(write(base)), load_suite(write(f"{base}{key} = {value}"))
    assert changed != plain
    assert (changed.digest() == plain.digest()) == (key in INERT)


def test_the_hash_does_not_depend_on_how_a_number_is_written(write):
    same = 'extends = "digits"\n[schedule]\nmilestones = [4.0, 6e0]\nwarmup_epochs = 1.0'
    assert load_suite(write(same)).digest() == load_suite(write('extends = "digits"')).digest()


def test_the_hash_changes_with_the_encoding(write):
    suite = load_suite(write(ENCODED))
    decoded = suite.model_copy(update={"data": suite.data.model_copy(update={"encoded": False})})
    assert decoded.digest() != suite.digest()


def test_every_field_is_classified_by_its_effect_on_numbers():
    """Every new field must be added to HASHED or INERT above."""
    digits, imagenet = (leaves(load_suite(name).model_dump()) for name in ("digits", "imagenet"))
    known = {*HASHED, *HASHED_ENCODED, *INERT, "data.encoded", "version", "name"}
    assert digits.keys() | imagenet.keys() == known | {CROP}  # a section that may be absent


def test_a_suite_cannot_be_changed(suite: Suite):
    fields = {"epochs": suite.schedule, "images": suite.data.train, "padding": suite.augmentation}
    for field, part in (fields | {"batch_size": suite, "momentum": suite.optimizer}).items():
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, field, 1)
    assert isinstance(suite.schedule.milestones, tuple) and isinstance(suite.architectures, tuple)
