-- What is due beyond a place in the order of (due_at, id), or from the beginning where there is none; and in
-- how many seconds the next is due. At least one row. Index (due_at, id).
-- $1 due_at  $2 id  $3 at most so many
select m.id, m.topic, m.key, m.bytes, m.due_at, n.secs
  from (select extract(epoch from (
                   select d.due_at from shardmq.delayed d
                    where d.due_at > (select shardmq.clock())
                    order by d.due_at limit 1) - shardmq.clock())::float8 as secs) n
  left join (
       select d.id, d.topic, d.key, d.due_at,
              coalesce(octet_length(d.payload), 0) + coalesce(octet_length(d.key), 0)
                  + case when pg_column_compression(d.headers) is null
                            then coalesce(pg_column_size(d.headers), 0)
                            else octet_length(d.headers::text) end as bytes
         from shardmq.delayed d
        where (d.due_at, d.id) > ($1::timestamptz, $2::bigint)
          and d.due_at <= (select shardmq.clock())
        order by d.due_at, d.id limit $3::int) m on true
 order by m.due_at, m.id
