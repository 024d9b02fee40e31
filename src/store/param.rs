//! Parameters that know their types, so that a statement needs no round trip to learn them: where none
//! can be kept prepared, types travel with each.

use std::error::Error as StdError;
use std::fmt;
use std::time::SystemTime;

use bytes::BytesMut;
use tokio_postgres::types::{Format, IsNull, ToSql, Type, to_sql_checked};
use uuid::Uuid;

/// A parameter of a statement.
pub(crate) trait Param: ToSql + Sync {
    /// The type that the statement has in its place.
    fn of_type(&self) -> Type;
}

macro_rules! params {
    ($($rust:ty = $one:ident, $many:ident;)*) => {$(
        impl Param for $rust {
            fn of_type(&self) -> Type {
                Type::$one
            }
        }

        impl Param for Option<$rust> {
            fn of_type(&self) -> Type {
                Type::$one
            }
        }

        impl Param for Vec<$rust> {
            fn of_type(&self) -> Type {
                Type::$many
            }
        }

        impl Param for Vec<Option<$rust>> {
            fn of_type(&self) -> Type {
                Type::$many
            }
        }

        impl Param for Option<Vec<$rust>> {
            fn of_type(&self) -> Type {
                Type::$many
            }
        }

        impl Param for &[$rust] {
            fn of_type(&self) -> Type {
                Type::$many
            }
        }
    )*};
}

params! {
    bool = BOOL, BOOL_ARRAY;
    i32 = INT4, INT4_ARRAY;
    i64 = INT8, INT8_ARRAY;
    f64 = FLOAT8, FLOAT8_ARRAY;
    &str = TEXT, TEXT_ARRAY;
    &[u8] = BYTEA, BYTEA_ARRAY;
    String = TEXT, TEXT_ARRAY;
    Uuid = UUID, UUID_ARRAY;
    SystemTime = TIMESTAMPTZ, TIMESTAMPTZ_ARRAY;
}

/// A value whose type is not told by its own: an array in its packed form, or one that may be null.
#[derive(Debug)]
pub(crate) struct Typed<T>(pub(crate) T, pub(crate) Type);

impl<T: ToSql> ToSql for Typed<T> {
    fn to_sql(
        &self,
        ty: &Type,
        out: &mut BytesMut,
    ) -> Result<IsNull, Box<dyn StdError + Sync + Send>> {
        self.0.to_sql(ty, out)
    }

    fn accepts(ty: &Type) -> bool {
        T::accepts(ty)
    }

    to_sql_checked!();
}

impl<T: ToSql + Sync> Param for Typed<T> {
    fn of_type(&self) -> Type {
        self.1.clone()
    }
}

/// A value that no log shows: the driver prints the parameters of each statement at the level debug.
pub(crate) struct Unseen<'a>(pub(crate) &'a (dyn ToSql + Sync));

impl fmt::Debug for Unseen<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("..")
    }
}

impl ToSql for Unseen<'_> {
    fn to_sql(
        &self,
        ty: &Type,
        out: &mut BytesMut,
    ) -> Result<IsNull, Box<dyn StdError + Sync + Send>> {
        self.0.to_sql_checked(ty, out)
    }

    /// The value itself is asked when it is written.
    fn accepts(_: &Type) -> bool {
        true
    }

    fn encode_format(&self, ty: &Type) -> Format {
        self.0.encode_format(ty)
    }

    to_sql_checked!();
}

/// The values alone.
pub(crate) fn values<'a>(params: &[&'a dyn Param]) -> Vec<&'a (dyn ToSql + Sync)> {
    params.iter().map(|param| *param as &(dyn ToSql + Sync)).collect()
}

/// The values with their types.
pub(crate) fn typed<'a>(params: &[&'a dyn Param]) -> Vec<(&'a (dyn ToSql + Sync), Type)> {
    params.iter().map(|param| (*param as &(dyn ToSql + Sync), param.of_type())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_that_no_log_shows_is_sent_as_it_is() {
        let (number, text) = (7i64, "a secret");
        for (value, ty) in [(&number as &(dyn ToSql + Sync), Type::INT8), (&text, Type::TEXT)] {
            let (mut plain, mut unseen) = (BytesMut::new(), BytesMut::new());
            value.to_sql_checked(&ty, &mut plain).unwrap();
            Unseen(value).to_sql_checked(&ty, &mut unseen).unwrap();
            assert_eq!(plain, unseen);
            assert_eq!(format!("{:?}", Unseen(value)), "..");
        }
        let refused = Unseen(&text).to_sql_checked(&Type::INT8, &mut BytesMut::new());
        assert!(refused.is_err());
    }
}
