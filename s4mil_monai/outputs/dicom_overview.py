"""An overview of a slide file as a DICOM whole slide image of one level, for results to refer to."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms
from pydicom import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import JPEGBaseline8Bit, VLWholeSlideMicroscopyImageStorage

from s4mil_monai import __version__
from s4mil_monai.outputs.dicom_codes import as_item
from s4mil_monai.outputs.dicom_frame import SlideFrame
from s4mil_monai.outputs.heatmap import HeatmapPicture
from s4mil_monai.outputs.identity import make_uid
from s4mil_monai.slides.slide import WHITE

OVERVIEW_DESCRIPTION = "Overview of a slide file, for the results of s4mil"
"""Of its series; a search for slides passes it over."""

TILE_PX = 256
JPEG_QUALITY = 90

UNKNOWN_TIME = "19000101"
"""When a slide file was scanned is not looked up; DICOM wants a date."""


def make_overview(picture: HeatmapPicture, identity: Dataset, frame: SlideFrame) -> Dataset:
    """A DICOM image of the whole scan as the heatmap's picture shows it, in the frame of the slide's level 0.

    Args:
        picture: The scan without the colours is taken; a label or macro image is not in it.
        identity: Patient, study, specimen and UIDs of the image to be.
        frame: Of level 0.
    """
    height, width = picture.slide.shape[:2]
    frames = [_as_jpeg(tile) for tile in _tiles(picture.slide)]
    image = Dataset()
    image.update(identity)
    _describe_image(image, (width, height), len(frames))
    _describe_place(image, frame, (width, height), picture.px0_per_px)
    _describe_optics(image)
    ratio = len(frames) * TILE_PX * TILE_PX * 3 / sum(len(data) for data in frames)
    image.LossyImageCompression, image.LossyImageCompressionMethod = "01", "ISO_10918_1"
    image.LossyImageCompressionRatio = f"{ratio:.2f}"
    image.PixelData = encapsulate(frames)
    image["PixelData"].is_undefined_length = True
    image.file_meta = Dataset()  # type: ignore[assignment]
    image.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    return image


def _tiles(pixels: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """Whole tiles, row by row; white beyond the picture."""
    height, width = pixels.shape[:2]
    padded = np.pad(
        pixels, ((0, -height % TILE_PX), (0, -width % TILE_PX), (0, 0)), mode="constant", constant_values=WHITE
    )
    for top in range(0, height, TILE_PX):
        for left in range(0, width, TILE_PX):
            yield padded[top : top + TILE_PX, left : left + TILE_PX]


def _as_jpeg(tile: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(tile).save(buffer, "jpeg", quality=JPEG_QUALITY, subsampling="4:2:2")
    return buffer.getvalue()


def _describe_image(image: Dataset, size_px: tuple[int, int], frames: int) -> None:
    image.SOPClassUID, image.Modality = VLWholeSlideMicroscopyImageStorage, "SM"
    image.ImageType = ["DERIVED", "PRIMARY", "VOLUME", "RESAMPLED"]
    image.SeriesDescription = OVERVIEW_DESCRIPTION
    image.SeriesNumber, image.InstanceNumber = 900, 1
    image.Manufacturer, image.ManufacturerModelName = "s4mil_monai", "overview"
    image.DeviceSerialNumber, image.SoftwareVersions = "none", __version__
    image.AcquisitionDateTime = UNKNOWN_TIME
    image.Rows, image.Columns, image.NumberOfFrames = TILE_PX, TILE_PX, frames
    image.TotalPixelMatrixColumns, image.TotalPixelMatrixRows = size_px
    image.SamplesPerPixel, image.PhotometricInterpretation = 3, "YBR_FULL_422"
    image.PlanarConfiguration, image.PixelRepresentation = 0, 0
    image.BitsAllocated, image.BitsStored, image.HighBit = 8, 8, 7
    image.BurnedInAnnotation, image.SpecimenLabelInImage = "NO", "NO"
    image.VolumetricProperties, image.FocusMethod, image.ExtendedDepthOfField = "VOLUME", "AUTO", "NO"


def _describe_place(
    image: Dataset, frame: SlideFrame, size_px: tuple[int, int], px0_per_px: tuple[float, float]
) -> None:
    spacing_mm = (frame.spacing_mm[0] * px0_per_px[1], frame.spacing_mm[1] * px0_per_px[0])
    x_mm, y_mm, z_mm = frame.to_mm([(px0_per_px[0] / 2, px0_per_px[1] / 2)])[0]  # centre of its first pixel
    origin = Dataset()
    origin.XOffsetInSlideCoordinateSystem = round(float(x_mm), 9)
    origin.YOffsetInSlideCoordinateSystem = round(float(y_mm), 9)
    origin.ZOffsetInSlideCoordinateSystem = float(z_mm)
    image.TotalPixelMatrixOriginSequence = Sequence([origin])
    image.ImageOrientationSlide = [float(value) for value in frame.orientation]
    image.PositionReferenceIndicator = "SLIDE_CORNER"
    image.ImagedVolumeWidth, image.ImagedVolumeHeight = size_px[0] * spacing_mm[1], size_px[1] * spacing_mm[0]
    image.ImagedVolumeDepth = 1.0
    image.TotalPixelMatrixFocalPlanes = 1
    measures = Dataset()
    measures.PixelSpacing = [round(value, 12) for value in spacing_mm]
    measures.SliceThickness = 0.001
    kind = Dataset()
    kind.FrameType = list(image.ImageType)
    shared = Dataset()
    shared.PixelMeasuresSequence = Sequence([measures])
    shared.WholeSlideMicroscopyImageFrameTypeSequence = Sequence([kind])
    image.SharedFunctionalGroupsSequence = Sequence([shared])
    organization = Dataset()
    organization.DimensionOrganizationUID = make_uid("dimensions", image.SOPInstanceUID)
    image.DimensionOrganizationSequence = Sequence([organization])
    image.DimensionOrganizationType = "TILED_FULL"


def _describe_optics(image: Dataset) -> None:
    image.ContainerTypeCodeSequence = Sequence([as_item("433466003", "SCT", "Microscope slide")])
    image.IssuerOfTheContainerIdentifierSequence = Sequence()
    image.AcquisitionContextSequence = Sequence()
    path = Dataset()
    path.OpticalPathIdentifier = "1"
    path.IlluminationTypeCodeSequence = Sequence([as_item("111744", "DCM", "Brightfield illumination")])
    path.IlluminationColorCodeSequence = Sequence([as_item("414298005", "SCT", "Full Spectrum")])
    path.ICCProfile = _srgb()
    image.OpticalPathSequence = Sequence([path])
    image.NumberOfOpticalPaths = 1


def _srgb() -> bytes:
    """An sRGB profile without the time at which it was made (bytes 24 to 35), so that it is always the same."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile[:24] + bytes(12) + profile[36:]
