//! The rule that every backend checks before it touches the device: whole sectors, within its size.

use crate::{DevError, Geometry, Result};

/// The total of `lens` if the operation is made of whole sectors inside the device.
pub(crate) fn check(
    op: &'static str,
    geometry: &Geometry,
    offset: u64,
    lens: impl IntoIterator<Item = usize>,
) -> Result<usize> {
    let sector = u64::from(geometry.sector_size);
    let mut total = 0usize;
    let mut whole = offset.is_multiple_of(sector);
    for len in lens {
        whole &= (len as u64).is_multiple_of(sector);
        total = match total.checked_add(len) {
            Some(sum) => sum,
            None => return Err(DevError::Range { op, offset, len, size: geometry.size }),
        };
    }
    let inside = offset.checked_add(total as u64).is_some_and(|end| end <= geometry.size);
    if whole && inside { Ok(total) } else { Err(DevError::Range { op, offset, len: total, size: geometry.size }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::FencingKind;

    #[test]
    fn whole_sectors_inside_the_device_only() {
        let g = Geometry {
            sector_size: 512,
            size: 4096,
            write_cache: true,
            fencing: FencingKind::None,
            others_unseen: false,
        };
        assert_eq!(check("read", &g, 512, [512, 1024]).unwrap(), 1536);
        assert_eq!(check("read", &g, 0, [4096]).unwrap(), 4096);
        for (offset, lens) in [
            (1, vec![512]),
            (0, vec![100]),
            (0, vec![256, 256]),
            (4096, vec![512]),
            (0, vec![4608]),
            (u64::MAX - 511, vec![512]),
            (0, vec![usize::MAX - 511, 512]),
        ] {
            assert!(matches!(check("read", &g, offset, lens), Err(DevError::Range { .. })));
        }
    }
}
