-- What is in the outbox above an id and in ranges of ids below it, in order, all in one snapshot, which is
-- told, with the highest id that was drawn. At least one row, with nulls where there is no message. Primary
-- key; nothing is read of an id that is in no range. The sequence's value is asked of the function, which
-- locks its page: read as a table beside a running nextval(), it is up to 32 too high for a moment.
-- $1 above this id  $2 at most so many  $3 first ids of ranges  $4 their last ids
-- $5 whether to draw a transaction id
select s.snapshot, s.own, s.last_id, s.started, m.id, m.topic, m.key, m.bytes
  from (select pg_current_snapshot()::text as snapshot,
               case when $5::bool then pg_current_xact_id()::text end as own,
               coalesce(pg_sequence_last_value('shardmq.outbox_id'::regclass), 0) as last_id,
               extract(epoch from pg_postmaster_start_time())::float8 as started
        offset 0) s
  left join (
       select a.id, a.topic, a.key, a.bytes
         from ((select o.id, o.topic, o.key, o.bytes
                  from unnest($3::bigint[], $4::bigint[]) r (first, last),
                       lateral (select x.id, x.topic, x.key,
                                       coalesce(octet_length(x.payload), 0)
                                           + coalesce(octet_length(x.key), 0)
                                           + case when pg_column_compression(x.headers) is null
                            then coalesce(pg_column_size(x.headers), 0)
                            else octet_length(x.headers::text) end as bytes
                                  from shardmq.outbox x
                                 where x.id between r.first and r.last
                                 order by x.id limit $2::int) o)
               union all
               (select y.id, y.topic, y.key,
                       coalesce(octet_length(y.payload), 0) + coalesce(octet_length(y.key), 0)
                           + case when pg_column_compression(y.headers) is null
                            then coalesce(pg_column_size(y.headers), 0)
                            else octet_length(y.headers::text) end
                  from shardmq.outbox y
                 where y.id > $1::bigint
                 order by y.id limit $2::int)) a
        order by a.id limit $2::int) m on true
 order by m.id
