-- Takes messages out of both tables, and freezes them as batches for their partitions, in the order of the
-- batches. What is gone is left out. Under the relay's lock only. Primary keys:
-- no join may come in between, whose plan could read the ids once for each row of the table.
-- Of the outbox: $1 ids  $2 the batch of each, from 1  $3 its place
-- Of those for later: $4 ids  $5 batches  $6 places
-- Batches: $7 partitions  $8 topics  $9 generations  $10 producers  $11 days
-- $12 the first days on which they are looked for
-- $13 of how many bytes a batch is returned with its messages; a larger one without them  $14 ids of the topics
with published as (
    delete from shardmq.outbox o
     where o.id = any($1::bigint[]) and current_setting('shardmq.relay', true) = 'true'
    returning o.id, o.uid, o.key, o.headers, o.payload
), due as (
    delete from shardmq.delayed d
     where d.id = any($4::bigint[]) and current_setting('shardmq.relay', true) = 'true'
    returning d.id, d.uid, d.key, d.headers, d.payload
), gathered as (
    select m.batch, count(*)::int as count,
           sum(octet_length(m.payload) + coalesce(octet_length(m.key), 0)
               + coalesce(octet_length(m.headers::text), 0))::int as bytes,
           array_agg(m.id order by m.place) as ids,
           array_agg(m.uid order by m.place) as uids,
           case when count(m.key) > 0 then array_agg(m.key order by m.place) end as keys,
           case when count(m.headers) > 0 then array_agg(m.headers order by m.place) end as headers,
           array_agg(m.payload order by m.place) as payloads
      from (select w.batch, w.place, p.*
              from published p join unnest($1, $2::int[], $3::int[]) w (id, batch, place) on w.id = p.id
            union all
            select w.batch, w.place, d.*
              from due d join unnest($4, $5::int[], $6::int[]) w (id, batch, place) on w.id = d.id) m
     group by m.batch
)
insert into shardmq.outbox_batch as b
       (id, partition, topic, topic_id, generation, producer, first_day, day, count, bytes, ids, uids, keys,
        headers, payloads)
select nextval('shardmq.outbox_batch_id'), ($7::int[])[g.batch], ($8::text[])[g.batch], ($14::uuid[])[g.batch],
       ($9::int[])[g.batch], ($10::uuid[])[g.batch], ($12::int[])[g.batch], ($11::int[])[g.batch],
       g.count, coalesce(g.bytes, 0), g.ids, g.uids, g.keys, g.headers, g.payloads
  from gathered g
 order by g.batch
returning b.id, b.partition, b.topic, b.generation, b.producer, b.first_day, b.day, b.state, b.count, b.bytes,
          case when b.bytes <= $13::int then b.ids end, case when b.bytes <= $13 then b.keys end,
          case when b.bytes <= $13 then b.headers end, case when b.bytes <= $13 then b.payloads end,
          case when b.bytes <= $13 then b.uids end, b.topic_id
